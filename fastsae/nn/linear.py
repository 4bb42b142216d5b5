"""The two layers of an SAE for modules of one's own: a linear map into codes, and one from them."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastsae.codes import Codes, check_k
from fastsae_kernels import By, check_by, encode_topk


class TopKLinear(nn.Module):
    """A linear layer that returns only the k largest of its d_sae outputs, as codes.

    codes = topk(x weight^T + bias): by="value" sets those below 0 to 0 (arXiv:2406.04093),
    by="abs" ranks magnitudes and keeps signs (arXiv:2510.00404). weight [d_sae, d_in] starts with
    random rows of norm 1, bias [d_sae] with 0. Under autocast it computes in autocast's dtype, as
    torch.nn.Linear does. ValueError unless 1 <= k <= d_sae.
    """

    by: By

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: int,
        by: By = "value",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_k(k, d_sae)
        check_by(by)
        self.d_in, self.d_sae, self.k, self.by = d_in, d_sae, k, by
        self.weight = unit_rows(d_sae, d_in, device, dtype)
        self.bias = nn.Parameter(torch.zeros(d_sae, device=device, dtype=dtype))

    def forward(self, x: Float[Tensor, "... d_in"]) -> Codes:
        """The codes of x, its leading dimensions flattened to N tokens.

        Raises ValueError if the last dimension is not d_in, or for another dtype than the weight's.
        """
        if x.shape[-1] != self.d_in:
            raise ValueError(f"x must end in d_in = {self.d_in}, got shape {list(x.shape)}")
        x, weight, bias = autocast(x.reshape(-1, self.d_in), self.weight, self.bias)
        values, indices = encode_topk(x, weight, bias, self.k, self.by)
        return Codes(values, indices, self.d_sae)

    def extra_repr(self) -> str:
        return f"d_in={self.d_in}, d_sae={self.d_sae}, k={self.k}, by={self.by!r}"


class CodesLinear(nn.Module):
    """A linear layer whose inputs are codes: the weighted sum of few rows of its weight.

    out = codes weight + bias, of shape [N, d_out]; `out.view(*x.shape[:-1], d_out)` has the shape
    that the codes' x had. weight [d_sae, d_out] starts with random rows of norm 1, bias [d_out]
    with 0. Under autocast it computes in autocast's dtype.
    """

    def __init__(
        self,
        d_sae: int,
        d_out: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.d_sae, self.d_out = d_sae, d_out
        self.weight = unit_rows(d_sae, d_out, device, dtype)
        self.bias = nn.Parameter(torch.zeros(d_out, device=device, dtype=dtype))

    def forward(self, codes: Codes) -> Float[Tensor, "N d_out"]:
        """Raises ValueError for codes of another d_sae."""
        if codes.d_sae != self.d_sae:
            raise ValueError(f"codes must be of d_sae = {self.d_sae} latents, got {codes.d_sae}")
        values, weight, bias = autocast(codes.values, self.weight, self.bias)
        return codes._replace(values=values).decode(weight) + bias

    def extra_repr(self) -> str:
        return f"d_sae={self.d_sae}, d_out={self.d_out}"


def unit_rows(
    rows: int, columns: int, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Parameter:
    return nn.Parameter(normalize(torch.randn(rows, columns, device=device, dtype=dtype), dim=1))


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype, where it is on: it does not know our ops. As for those it
    knows, float64 stays. Of meta tensors, torch cannot say whether it is on."""
    kind = tensors[0].device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind) or tensors[0].dtype == torch.float64:
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors)
