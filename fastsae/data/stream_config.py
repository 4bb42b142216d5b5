"""Settings of a stream, and how it is opened."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from fastsae.data.hook_names import is_path, module_paths
from fastsae.data.open_producer import facts, loaded, open_producer, read_files, request
from fastsae.data.producer_config import ProducerConfig
from fastsae.data.stream import BUFFER_CONTEXTS, BUFFER_TOKENS, Stream
from fastsae.device import check_device, same_gpu
from fastsae.distributed.launch import place
from fastsae.memory import memory_left

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class StreamConfig(ProducerConfig):
    """Run a Hugging Face model over text and train on its activations as they come."""

    buffer_tokens: int | None = None
    """Tokens in the buffer that mixes documents (default: 524,288, or 512 contexts if that is more;
    less if half of the available memory does not hold them)."""

    model_device: str | None = None
    """Device for the model (default: that of training)."""

    def __post_init__(self):
        super().__post_init__()
        if self.model_device is not None:
            check_device(self.model_device)
        if self.buffer_tokens is not None and self.buffer_tokens < 2:
            raise ValueError(f"buffer_tokens must be at least 2, got {self.buffer_tokens}")

    def open(
        self,
        device: str,
        further: Sequence[str] = (),
        *,
        fill: bool = True,
        memory: int | None = None,
    ) -> "tuple[StreamConfig, Stream]":
        """The stream of all hookpoints, followed by further ones; and the settings with what was
        left open: paths of modules for other names, and the size of the buffer. ValueError for text
        or hookpoints that do not exist, further ones that are not, and a buffer larger than the
        available memory, if it is to be filled: that of this process, at most `memory` bytes."""
        files = read_files(self)
        with same_gpu():  # that of training
            model = loaded(self, self.model_device or device)
        config = self.with_paths(model)
        own, others = config.hookpoints, [module_paths(model, [name]) for name in further]
        names = (*own, *chain(*others))
        if repeated := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"hookpoint, target and layers must differ, got {min(repeated)} twice")
        producer, _ = open_producer(replace(config, hookpoint=names), files, model)
        row_bytes = sum(producer.widths.values()) * model.dtype.itemsize
        tokens = None if fill else self.buffer_tokens
        tokens = tokens or config.fitting(row_bytes, memory)
        about = request(config, files, "any") | facts(producer, names)
        # A buffer takes whole groups.
        producer.group_tokens = min(producer.group_tokens, max(self.batch_tokens, tokens // 8))
        stream = Stream(producer, tokens, model=config.model, harvest=about)
        return replace(config, buffer_tokens=tokens), stream

    def resolved(self) -> "StreamConfig":
        """The same with the paths of files written out."""
        model, dataset = (
            str(Path(name).resolve()) if name and Path(name).exists() else name
            for name in (self.model, self.dataset)
        )
        text = tuple(str(Path(pattern).resolve()) for pattern in self.text)
        return replace(self, model=model or self.model, dataset=dataset, text=text)

    def with_paths(self, model: "PreTrainedModel") -> "StreamConfig":
        """The same with paths for globs and TransformerLens names."""
        if all(map(is_path, self.hookpoints)):
            return self
        paths = module_paths(model, self.hookpoints)
        return replace(self, hookpoint=paths)

    def fitting(self, row_bytes: int, memory: int | None = None) -> int:
        """The tokens in the buffer, in at most `memory` bytes."""
        left = memory_left("cpu", place().local_size)
        most = (left if memory is None else min(left, memory)) // row_bytes
        if self.buffer_tokens is None:
            wanted = max(BUFFER_TOKENS, BUFFER_CONTEXTS * self.context_length)
            return max(2, min(wanted, most // 2))
        if self.buffer_tokens > most:
            raise ValueError(
                f"buffer_tokens must be at most {most:,}, which fill the available memory with "
                f"{row_bytes:,} bytes per token, got {self.buffer_tokens:,}"
            )
        return self.buffer_tokens
