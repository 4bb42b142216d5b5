"""Rational SAEs whose latents have a function each: an experiment, not a method.

The paper's latents share one function (arXiv:2606.14990). These start as copies of it and are
trained apart, which shows what sharing costs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from fastsae import SAE
from fastsae.codes import Codes
from fastsae.nn.rational import Rational, RationalConfig
from fastsae.nn.sparse_pre import SparsePre
from fastsae_kernels.rational import rational_reference


@dataclass(frozen=True, kw_only=True)
class PerLatentConfig(RationalConfig):
    """The settings of each latent's function; ValueError without the teacher's support."""

    name = "rational-per-latent"

    rate: float = 1.0
    """Factor of the learning rate of a and b, whose steps Adam makes independent of scale."""

    def __post_init__(self):
        super().__post_init__()
        if self.support != "teacher":
            raise ValueError(f'a function per latent needs support "teacher", got "{self.support}"')


class PerLatent(Rational, config=PerLatentConfig):
    """A rational function per latent."""

    cfg: PerLatentConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def build(self, d_in: int, d_sae: int) -> None:
        super().build(d_in, d_sae)
        self.change = nn.Parameter(torch.zeros(d_sae, len(self.change)))
        if self.degree[1]:
            self.scale_change = nn.Parameter(torch.zeros(d_sae, 2))

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """a [p + 1, d_sae], b [q, d_sae], c_in and c_out [d_sae]."""
        p, q = self.degree
        each = torch.addcmul(self.start, self.unit, self.change * self.cfg.rate)
        a, b = each.T.split([p + 1, q])
        c_in, c_out = (self.scale * self.scale_change.exp()).expand(len(each), 2).unbind(1)
        return a, b, c_in, c_out

    def codes(self, found: SparsePre, s: Tensor | float) -> Codes:
        p, q = self.degree
        table = torch.cat([part.reshape(-1, found.d_sae) for part in self.coefficients()])
        latents = Codes(found.pre, found.indices, found.d_sae).latents()
        entries = embedding(latents, table.T)  # [N, K, p + 1 + q + 2]
        a, b, (c_in, c_out) = entries.movedim(2, 0).split([p + 1, q, 2])
        return found.codes(rational_reference(found.pre, a, b, c_in, c_out, s))


def per_latent(shared: SAE, rate: float) -> SAE:
    """An SAE with the function of this one for each latent; `rate` as in PerLatentConfig."""
    cfg = PerLatentConfig(**vars(shared.activation.cfg), rate=rate)
    sae = SAE(**shared.shape(), activation=PerLatent(cfg)).eval()
    sizes = sae.state_dict()
    state = {name: t.expand_as(sizes[name]) for name, t in shared.state_dict().items()}
    state["activation.change"] = state["activation.change"] / rate
    sae.load_state_dict(state)
    return sae
