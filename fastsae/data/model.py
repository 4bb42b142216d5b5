"""Hugging Face models: load one and its tokenizer, and cut text into windows for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from fastsae.data.index import DTYPES
from fastsae.device import choose_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fastsae.data.text import Document

PrependBos = Literal["auto", "yes", "no"]


class TokenBatch(NamedTuple):
    """B windows of text, padded on the right to T tokens."""

    input_ids: Int[Tensor, "B T"]
    attention_mask: Int[Tensor, "B T"]
    keep: Bool[Tensor, "B T"]
    """False for padding and special tokens."""


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """Which files of a model folder or hub id to load."""

    revision: str | None = None
    """Branch, tag or commit on the hub."""

    gguf_file: str | None = None
    """Name of a GGUF file."""

    trust_remote_code: bool = False
    """Whether to run Python code that comes with the model."""

    @classmethod
    def of(cls, harvest: dict[str, Any], trust_remote_code: bool = False) -> "ModelFiles":
        """Those that activations were harvested with. Data cannot ask to run code: the user can."""
        revision, gguf_file = harvest.get("revision"), harvest.get("gguf_file")
        return cls(revision=revision, gguf_file=gguf_file, trust_remote_code=trust_remote_code)


def load_model(
    name: str, device: str = "cpu", dtype: str = "float32", files: ModelFiles | None = None
) -> "PreTrainedModel":
    """Load a model from a folder or hub id for inference: a causal language model with its head,
    any other with `AutoModel`. ValueError if it cannot be loaded."""
    options = {"dtype": getattr(torch, dtype), **asdict(files or ModelFiles())}
    with _transformers() as transformers:
        if device.startswith("cuda"):
            choose_device(device)
        with _loading(name):
            model = _with_head(transformers, name, options)
            model = model or transformers.AutoModel.from_pretrained(name, **options)
    model.config.use_cache = False
    return model.eval().requires_grad_(False).to(torch.device(device))


def _with_head(transformers: Any, name: str, options: dict[str, Any]) -> Any:
    """A causal language model with its head; None if it is another model.

    Some configs, such as those of GGUF files, name no architecture. Then the model must be of a
    type that has no masked language models, and its weights must include the head.
    """
    config = transformers.AutoConfig.from_pretrained(name, **options)
    if not _may_be_causal(config):
        return None
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        name, output_loading_info=True, **options
    )
    return model if config.architectures or not info["missing_keys"] else None


def _may_be_causal(config: Any) -> bool:
    """Whether a model of this config predicts next tokens, as far as the config tells."""
    from transformers.models.auto import modeling_auto

    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    masked = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if named := config.architectures:
        own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
        return own_code or not set(causal.values()).isdisjoint(named)
    return config.model_type in causal.keys() - masked.keys()


def load_causal(name: str, files: ModelFiles | None, most_bytes: int) -> "PreTrainedModel | None":
    """Load a causal language model with its head in float32; None, and nothing is loaded, if it is
    another kind of model. ValueError if it cannot be loaded, or needs more than `most_bytes`."""
    files = files or ModelFiles()
    options = {"dtype": torch.float32, **asdict(files)}
    with _transformers() as transformers, _loading(name):
        config = transformers.AutoConfig.from_pretrained(name, **options)
        if not _may_be_causal(config):
            return None
        with torch.device("meta"):
            empty = transformers.AutoModelForCausalLM.from_config(
                config, trust_remote_code=files.trust_remote_code
            )
        if (size := 4 * empty.num_parameters()) > most_bytes:
            raise ValueError(f"it needs {size:,} bytes, more than are available")
        return _with_head(transformers, name, options)


def own_dtype(name: str, files: ModelFiles | None = None) -> str:
    """The dtype of a model's own weights, as its config says; float32 if it names no or another
    one. ValueError if there is no config."""
    with _transformers() as transformers, _loading(name):
        config = transformers.AutoConfig.from_pretrained(name, **asdict(files or ModelFiles()))
    found = str(config.dtype).removeprefix("torch.")
    return found if found in DTYPES else "float32"


def load_tokenizer(name: str, files: ModelFiles | None = None) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a model folder or hub id; ValueError if it has none."""
    with _transformers() as transformers, _loading(name):
        return transformers.AutoTokenizer.from_pretrained(name, **asdict(files or ModelFiles()))


@contextmanager
def _transformers() -> Iterator[Any]:
    try:
        import transformers
    except ImportError as error:
        raise ValueError("models need transformers: pip install 'fastsae-triton[hf]'") from error
    bar = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield transformers
    finally:
        if bar:
            transformers.utils.logging.enable_progress_bar()


@contextmanager
def _loading(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if "trust_remote_code" in str(error):
            reason = "it comes with its own Python code, which only --trust-remote-code runs"
        raise ValueError(
            f"cannot load {name!r} as a Hugging Face folder or id: {reason}"
        ) from error


class TextWindows:
    """Splits text into windows of tokens, each with the special tokens that the model expects.

    Args:
        tokenizer: puts its special tokens before and after the text of a window.
        context_length: tokens per window, special tokens included; ValueError if there are too many
            for the model or the tokenizer.
        model: the model that will read them.
        prepend_bos: whether windows begin with the BOS token; auto is what the tokenizer does.
        drop_first: whether the first position of each window is no row.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        context_length: int,
        model: "PreTrainedModel | None" = None,
        *,
        prepend_bos: PrependBos = "auto",
        drop_first: bool = False,
    ):
        longest = min(
            tokenizer.model_max_length,
            getattr(model and model.config, "max_position_embeddings", None) or context_length,
        )
        if context_length > longest:
            raise ValueError(f"context_length must be at most {longest}, got {context_length}")
        self._tokenizer = tokenizer
        self._drop_first = drop_first
        self.special = frozenset(tokenizer.all_special_ids)
        self._pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.prefix, self.suffix = self._around()
        bos: Any = tokenizer.bos_token_id
        if prepend_bos == "yes":
            if bos is None:
                raise ValueError("prepend_bos is 'yes', but the model's tokenizer has no BOS token")
            self.prefix = [bos, *(token for token in self.prefix if token != bos)]
        self._unwanted = bos if prepend_bos == "no" else None
        self.prefix = [token for token in self.prefix if token != self._unwanted]
        self.text_tokens = context_length - len(self.prefix) - len(self.suffix)
        if self.text_tokens < 1:
            raise ValueError(f"context_length {context_length} leaves no room for text")

    def _around(self) -> tuple[list[int], list[int]]:
        """The special tokens that the tokenizer puts before and after a text."""
        for text in ("a", *self._tokenizer.get_vocab()):
            bare = self._ids(text)
            if bare and self.special.isdisjoint(bare):  # DNA tokenizers have no token for "a"
                whole = self._tokenizer(text)["input_ids"]
                start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
                return whole[:start], whole[start + len(bare) :]
        raise ValueError("the model's tokenizer has no tokens for text")

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def cut(self, document: "Document", max_tokens: int | None = None) -> list[list[int]]:
        """The consecutive windows of a document, or of its first `max_tokens`."""
        ids = self._ids(document) if isinstance(document, str) else self._without_padding(document)
        ids, size = self._without_frame(ids)[:max_tokens], self.text_tokens
        starts = range(0, len(ids), size)
        return [[*self.prefix, *ids[i : i + size], *self.suffix] for i in starts]

    def _without_padding(self, ids: list[int]) -> list[int]:
        """The ids without padding at the end, and at the start if it cannot be a BOS token."""
        start, stop = 0, len(ids)
        pad: Any = self._tokenizer.pad_token_id
        while stop and ids[stop - 1] == pad:
            stop -= 1
        if pad not in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id):
            while start < stop and ids[start] == pad:
                start += 1
        return ids[start:stop]

    def _without_frame(self, ids: list[int]) -> list[int]:
        """The ids without special tokens around them that every window gets, or must not have:
        chat templates and tokenized datasets often bring their own."""
        before, after = len(self.prefix), len(self.suffix)
        if self._unwanted is not None and ids[:1] == [self._unwanted]:
            ids = ids[1:]
        if before and ids[:before] == self.prefix:
            ids = ids[before:]
        return ids[:-after] if after and ids[-after:] == self.suffix else ids

    @property
    def begins_with_bos(self) -> bool:
        """Whether every window begins with the BOS token."""
        return self.prefix[:1] == [self._tokenizer.bos_token_id]

    def rows(self, window: list[int]) -> list[int]:
        """The positions in a window whose activations are rows: those of text tokens."""
        start = int(self._drop_first)
        return [p for p, token in enumerate(window) if p >= start and token not in self.special]

    def batch(self, windows: list[list[int]]) -> TokenBatch:
        """Windows padded on the right to the longest one."""
        lengths = torch.tensor([len(window) for window in windows])
        width = int(lengths.max())
        rows = [window + [self._pad] * (width - len(window)) for window in windows]
        ids = torch.tensor(rows)
        mask = torch.arange(width) < lengths[:, None]
        keep = mask & ~torch.isin(ids, torch.tensor(sorted(self.special), dtype=ids.dtype))
        keep[:, : int(self._drop_first)] = False
        return TokenBatch(ids, mask.long(), keep)
