"""Settings of what produces activations: a model, its text, and places in the model."""

from dataclasses import dataclass
from pathlib import Path

from fastsae.config import check_choices
from fastsae.data.index import Dtype
from fastsae.data.model import ModelFiles, PrependBos


@dataclass(frozen=True, kw_only=True)
class ProducerConfig:
    """Run a Hugging Face model over text and take its activations at one or more hookpoints."""

    model: str
    """Hugging Face hub id, or a model directory."""

    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""

    gguf_file: str | None = None
    """Name of a GGUF file in the model's directory or repository."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model."""

    hookpoint: str | tuple[str, ...]
    """Module whose output is taken, such as `encoder.layer.3` or `model.layers.12`; with `:in`
    appended, its input. Also a glob (`model.layers.*`) or a TransformerLens name
    (`blocks.12.hook_resid_post`). Several hookpoints share one pass over the text and have the same
    rows."""

    text: tuple[str, ...] = ()
    """Text files, directories or globs; .gz, .bz2, .xz and .zst are decompressed. A .jsonl file
    holds one object per line."""

    dataset: str | None = None
    """Hub id or directory of a dataset, instead of `text`."""

    dataset_config: str | None = None
    """Dataset configuration, if it has several."""

    dataset_split: str = "train"
    """Dataset split."""

    text_column: str = "text"
    """Column of the dataset, or field of .jsonl files, that holds the text, or lists of chat
    messages with a role and content."""

    tokens_column: str | None = None
    """Column or field that holds lists of token ids, instead of `text_column`."""

    context_length: int = 128
    """Context length in tokens, special tokens included; longer documents are split."""

    prepend_bos: PrependBos = "auto"
    """Whether each context begins with the BOS token: yes, no, or auto, as the model's tokenizer
    does."""

    drop_first: bool = False
    """Leave out the first position of each context, an attention sink with a huge norm in many
    models."""

    max_document_tokens: int | None = None
    """Use only the first N tokens of each document."""

    heldout_fraction: float = 0.05
    """Fraction of the documents (and of the parts of long ones) held out for evaluation."""

    model_dtype: Dtype = "float32"
    """Precision of the model."""

    batch_tokens: int = 8192
    """Tokens per forward pass, including padding."""

    def __post_init__(self):
        names = self.hookpoints
        if not names or len({*names}) < len(names) or any(Path(n).name != n for n in names):
            raise ValueError(f"hookpoint must be one or more distinct module paths, got {names}")
        if bool(self.text) == bool(self.dataset):
            raise ValueError(
                f"give either text or dataset, got text {self.text} and dataset {self.dataset!r}"
            )
        check_choices(self, model_dtype=Dtype, prepend_bos=PrependBos)
        for name in ("context_length", "max_document_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.batch_tokens < self.context_length:
            raise ValueError(
                f"batch_tokens must be at least context_length = {self.context_length}, "
                f"got {self.batch_tokens}"
            )
        if not 0 <= self.heldout_fraction < 1:
            raise ValueError(
                f"heldout_fraction must be at least 0 and below 1, got {self.heldout_fraction}"
            )
        if self.text and (self.dataset_config, self.dataset_split) != (None, "train"):
            raise ValueError("dataset_config and dataset_split need a dataset")
        if self.tokens_column and self.text_column != "text":
            raise ValueError(
                f"give either text_column or tokens_column, got {self.text_column!r} and "
                f"{self.tokens_column!r}"
            )

    @property
    def column(self) -> str:
        """The column that is read."""
        return self.tokens_column or self.text_column

    @property
    def files(self) -> ModelFiles:
        """Which files of the model to load."""
        return ModelFiles(
            revision=self.revision,
            gguf_file=self.gguf_file,
            trust_remote_code=self.trust_remote_code,
        )

    @property
    def hookpoints(self) -> tuple[str, ...]:
        """All hookpoints, in order."""
        return (self.hookpoint,) if isinstance(self.hookpoint, str) else self.hookpoint
