"""Hugging Face models: load one, find a hookpoint, read or replace its hidden states."""

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fastsae.device import choose_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


INPUT = ":in"  # suffix of a hookpoint's path: the module's input instead of its output


class TokenBatch(NamedTuple):
    """B windows of text, padded on the right to T tokens."""

    input_ids: Int[Tensor, "B T"]
    attention_mask: Int[Tensor, "B T"]
    keep: Bool[Tensor, "B T"]
    """False for padding and special tokens."""


def load_model(name: str, device: str = "cpu", dtype: str = "float32") -> "PreTrainedModel":
    """Load a model from a folder or hub id for inference: a causal language model with its head,
    any other with `AutoModel`. ValueError if it cannot be loaded."""
    with _transformers() as transformers:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        if device.startswith("cuda"):
            choose_device(device)
        with _loading(name):
            config = transformers.AutoConfig.from_pretrained(name)
            causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
            is_causal = not causal.isdisjoint(config.architectures or [])
            auto = transformers.AutoModelForCausalLM if is_causal else transformers.AutoModel
            model = auto.from_pretrained(name, dtype=getattr(torch, dtype))
    model.config.use_cache = False
    return model.eval().requires_grad_(False).to(torch.device(device))


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a model folder or hub id; ValueError if it has none."""
    with _transformers() as transformers, _loading(name):
        return transformers.AutoTokenizer.from_pretrained(name)


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
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"cannot load {name!r} as a Hugging Face folder or id: {reason}"
        ) from error


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path such as `encoder.layer.3`; a ValueError lists close matches."""
    names = [name for name, _ in model.named_modules() if name]
    if path in names:
        return model.get_submodule(path)
    near = [name for name in names if name.endswith(f".{path}")]
    near = near or difflib.get_close_matches(path, names, n=5, cutoff=0.4)
    near = near or [name for name, _ in model.named_children()]
    raise ValueError(f"{type(model).__name__} has no module {path!r}; nearest: {', '.join(near)}")


class Hookpoint(NamedTuple):
    """Where hidden states are read or replaced."""

    module: nn.Module
    at_input: bool = False
    """Whether they are the module's input instead of its output."""


def hookpoint_at(model: nn.Module, path: str) -> Hookpoint:
    """The output of the module at a dotted path, or with the suffix `:in` its input; a ValueError
    lists close matches."""
    return Hookpoint(module_at(model, path.removesuffix(INPUT)), path.endswith(INPUT))


def hidden_of(passed: Any) -> Float[Tensor, "B T d_in"]:
    """The hidden states in a module's inputs or outputs: a tensor, or the first of a tuple."""
    hidden = passed[0] if isinstance(passed, tuple) else passed
    if not isinstance(hidden, Tensor) or hidden.ndim != 3:
        found = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
        raise ValueError(f"a hookpoint's activations must be [batch, tokens, width], found {found}")
    return hidden


@contextmanager
def splice(
    module: nn.Module,
    replace: Callable[[Float[Tensor, "B T d_in"]], Float[Tensor, "B T d_in"]],
    at_input: bool = False,
) -> Iterator[None]:
    """While active, replace the module's output `hidden`, or with at_input its input, by
    `replace(hidden)`."""

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        replaced = replace(hidden_of(output))
        return (replaced, *output[1:]) if isinstance(output, tuple) else replaced

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (replace(hidden_of(args)), *args[1:]), kwargs
        hidden = hidden_of(kwargs.get("hidden_states"))
        return (), {**kwargs, "hidden_states": replace(hidden)}

    if at_input:
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


class _Reached(Exception):
    """Ends a forward pass once all hidden states are captured."""


def hidden_at(
    model: nn.Module, hookpoints: Sequence[Hookpoint], batch: TokenBatch
) -> list[Float[Tensor, "B T _"]]:
    """The hidden states at each hookpoint, from one forward pass that stops after the last one."""
    captured: dict[int, Tensor] = {}

    def capture(place: int, hidden: Tensor) -> Tensor:
        captured.setdefault(place, hidden.clone())  # a later layer may write to it
        if len(captured) == len(hookpoints):
            raise _Reached
        return hidden

    device = next(model.parameters()).device
    with torch.no_grad(), ExitStack() as spliced:
        for place, (module, at_input) in enumerate(hookpoints):
            spliced.enter_context(splice(module, partial(capture, place), at_input))
        try:
            model(
                input_ids=batch.input_ids.to(device),
                attention_mask=batch.attention_mask.to(device),
            )
        except _Reached:
            return [captured[place] for place in range(len(hookpoints))]
    missed = next(hook.module for place, hook in enumerate(hookpoints) if place not in captured)
    raise ValueError(f"the model's forward pass never called its {type(missed).__name__}")


class TextWindows:
    """Splits text into windows of tokens, each with the special tokens that the model expects.

    `context_length` includes the special tokens; ValueError if it is too long for the model or the
    tokenizer.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        context_length: int,
        model: "PreTrainedModel | None" = None,
    ):
        longest = min(
            tokenizer.model_max_length,
            getattr(model and model.config, "max_position_embeddings", None) or context_length,
        )
        if context_length > longest:
            raise ValueError(f"context_length must be at most {longest}, got {context_length}")
        self._tokenizer = tokenizer
        self.special = frozenset(tokenizer.all_special_ids)
        self._pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        whole, bare = tokenizer("a")["input_ids"], self._ids("a")
        start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        self._prefix, self._suffix = whole[:start], whole[start + len(bare) :]
        self.text_tokens = context_length - len(self._prefix) - len(self._suffix)
        if self.text_tokens < 1:
            raise ValueError(f"context_length {context_length} leaves no room for text")

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def cut(self, text: str, max_tokens: int | None = None) -> list[list[int]]:
        """The consecutive windows of a text, or of its first `max_tokens`."""
        ids, size = self._ids(text)[:max_tokens], self.text_tokens
        starts = range(0, len(ids), size)
        return [[*self._prefix, *ids[i : i + size], *self._suffix] for i in starts]

    def kept(self, window: list[int]) -> int:
        """The number of text tokens in a window."""
        return sum(token not in self.special for token in window)

    def batch(self, windows: list[list[int]]) -> TokenBatch:
        """Windows padded on the right to the longest one."""
        lengths = torch.tensor([len(window) for window in windows])
        width = int(lengths.max())
        rows = [window + [self._pad] * (width - len(window)) for window in windows]
        ids = torch.tensor(rows)
        mask = torch.arange(width) < lengths[:, None]
        keep = mask & ~torch.isin(ids, torch.tensor(sorted(self.special), dtype=ids.dtype))
        return TokenBatch(ids, mask.long(), keep)
