"""How an SAE's latents and a batch's tokens are spread over processes.

`Shards` itself is one process, which holds all latents and all tokens: its methods return what they
are given. `fastsae.distributed` has the one for a mesh of processes. The step, the losses and the
activations are written against these methods, so there is one code path.

A mesh has two axes. Along `latent`, processes hold different latents (rows of both weights) and see
the same tokens; along `data`, they hold the same latents and encode different tokens.
Shapes: N tokens of the batch, M of them of this process's place on the data axis, K entries.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

from jaxtyping import Float, Shaped
from torch import Tensor

from fastsae.codes import Codes
from fastsae_kernels import By, squared_error

Anything = TypeVar("Anything")


class Channel:
    """One process, which exchanges no messages outside the arithmetic of a step."""

    rank: int = 0
    size: int = 1

    def largest(self, own: int) -> int:
        """The largest number that any process has: what every step can afford to ask."""
        return own

    def rows_of_all(
        self, own: Shaped[Tensor, "n ..."], counts: Sequence[int]
    ) -> list[Shaped[Tensor, "m ..."]]:
        """Every process's rows, by rank; `counts` are their numbers."""
        return [own]


class Shards:
    """One process, and what a mesh of them has to offer."""

    rank: int = 0
    """This process's number; number 0 speaks, logs and writes for all."""
    size: int = 1
    """Number of processes: data * latent."""
    latent: int = 1
    """Processes among which the latents are divided."""
    data: int = 1
    """Processes among which the tokens are divided."""
    latent_rank: int = 0
    """Place on the latent axis; ranks are numbered along it first."""
    data_rank: int = 0
    """Place on the data axis."""
    control: Channel = Channel()
    """For small things that are not part of a step's arithmetic, such as signals."""

    def rows(self, d_sae: int) -> slice:
        """The latents of this process: an equal share of d_sae, which must be divisible."""
        return slice(0, d_sae)

    # --- tokens ------------------------------------------------------------------------------

    def gather_tokens(self, own: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "N ..."]:
        """Of all tokens, from each process's N / size of them, in the order of ranks."""
        return own

    def own_tokens(self, x: Shaped[Tensor, "N ..."]) -> Shaped[Tensor, "M ..."]:
        """Of the tokens of this place on the data axis, from all tokens."""
        return x

    def gather_data(self, own: Shaped[Tensor, "M ..."]) -> Shaped[Tensor, "N ..."]:
        """Of all tokens and this process's latents, from each place on the data axis."""
        return own

    def gather_entries(self, *own: Shaped[Tensor, "M K"]) -> tuple[Shaped[Tensor, "N widest"], ...]:
        """`gather_data` of each, where places have different K: columns of zeros make up for it."""
        return own

    def sum_data(self, part: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """Sum of the parts of all places on the data axis, in their order."""
        return part

    # --- latents -----------------------------------------------------------------------------

    def keep_best(self, codes: Codes, k: int, by: By, widest: int | None = None) -> Codes:
        """Of this process's best entries of each token, largest first, those that are among the k
        best of all processes; others become 0. Ties go to the lowest latent. `widest` is the
        largest K of any process, if they differ."""
        return codes

    def keep_best_of_batch(self, codes: Codes, k: int, by: By, differ: bool) -> Codes:
        """Of this process's best entries of the batch, those that are among the k best of all
        processes; others become 0. Ties go to the lowest token, then the lowest latent. `differ`
        says whether the places on the data axis have different tokens."""
        return codes

    def smallest(self, own: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The smallest of what the places on the latent axis have."""
        return own

    def counts(self, own: int) -> tuple[int, ...]:
        """The number that each place on the latent axis has of something; waits for a GPU."""
        return (own,)

    def total(self, part: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """Sum of the parts of all places on the latent axis, in their order. Its gradient is that
        of each part."""
        return part

    def spread(self, whole: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """What all places on the latent axis have, for use by each. Its gradient is the sum of
        theirs."""
        return whole

    def l0(self, codes: Codes) -> Float[Tensor, ""]:
        """Mean number of active latents per token, of all processes' codes of the same tokens."""
        return self.total(codes.active.sum()) / max(len(codes.values), 1)

    def squared_error(
        self,
        codes: Codes,
        W_dec: Float[Tensor, "d_sae d_out"],
        b_dec: Float[Tensor, " d_out"],
        target: Float[Tensor, "M d_out"],
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, "N d_out"], Float[Tensor, "M K"]]:
        """`fastsae_kernels.squared_error` of the reconstruction by all latents: squared errors and
        errors of all tokens, and dot products of this process's entries."""
        return squared_error(codes.values, codes.latents(), W_dec, b_dec, target)

    def below(self, d_sae: int, own: int) -> int:
        """How many of this process's `own` latents are among the first d_sae of all."""
        return d_sae

    def gather_latents(self, own: Shaped[Tensor, "share ..."]) -> Shaped[Tensor, "d_sae ..."]:
        """What belongs to all latents, from what belongs to those of each process."""
        return own

    # --- agreement ---------------------------------------------------------------------------

    def all_of(self, value: Anything) -> list[Anything]:
        """Every process's value, by rank: small Python objects. Waits for all."""
        return [value]

    def apart(self) -> AbstractContextManager[None]:
        """For the duration of what users have each process do, such as a callback. `together` must
        follow: where some processes call by then what all must call at once, such as an evaluation,
        it is a ValueError on all, and nobody waits for the others. Where both axes are longer than
        1, this holds for the first exchange within it and for those of all processes; a later one
        along an axis waits for processes that have left."""
        return nullcontext()

    def together(self, own: bool) -> bool:
        """Whether own is true on any process."""
        return own

    def channel(self) -> Channel:
        """For another thread than the one that trains. All processes make it at once."""
        return Channel()

    def part(self, data: int, latent: int) -> "Shards":
        """The mesh of these axes that this process is in, where all processes are divided into
        such meshes, in the order of ranks. All make theirs at once."""
        return self

    def __deepcopy__(self, memo: object) -> "Shards":
        return self


ONE_PROCESS = Shards()
"""The default everywhere."""
