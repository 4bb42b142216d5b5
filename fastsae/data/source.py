"""What the trainer asks of data, whether it lies on disk or is made up as it is needed."""

from typing import Protocol, runtime_checkable

from jaxtyping import Float32, Int
from torch import Tensor

from fastsae.data.prefetch import Batches
from fastsae.data.shuffle import Cursor


@runtime_checkable
class ActivationSource(Protocol):
    """Activations to train on: `ActivationShards`, `Synthetic`, or anything shaped like them."""

    @property
    def d_in(self) -> int:
        """Width of a row."""
        ...

    @property
    def n_tokens(self) -> int:
        """Rows in one epoch."""
        ...

    @property
    def mean_square(self) -> float:
        """Mean over all entries of their square."""
        ...

    @property
    def fingerprint(self) -> str:
        """A short hash: another one means other data, where a cursor has no meaning."""
        ...

    @property
    def heldout(self) -> "ActivationSource | None":
        """Rows set aside for evaluation."""
        ...

    def rows(self, indices: Int[Tensor, " N"]) -> Float32[Tensor, "N d_in"]:
        """The rows of these numbers, in this order."""
        ...

    def where(self, row: int) -> str:
        """A row's name for people: its file, and its number there."""
        ...

    def sample(self, n: int, seed: int = 0) -> Float32[Tensor, "_ d_in"]:
        """`n` different rows, or all there are; the same for the same seed."""
        ...

    def batches(
        self,
        batch_size: int,
        seed: int = 0,
        cursor: Cursor | None = None,
        pin_memory: bool = False,
        depth: int = 2,
    ) -> Batches:
        """Endless shuffled batches. From the cursor of an earlier batch they go on exactly. A row
        with NaN or Inf is a ValueError that names its shard and row there."""
        ...
