"""OpenAI's sparse_autoencoder (arXiv:2406.04093): one state dict in a file of any name.

Their ReLU SAEs; those with TopK subtract each token's mean and divide by its deviation, which an
SAE here does not.
"""

from pathlib import Path

from fastsae.nn import SAE, ReLU

from .archives import read_pt
from .parts import Tensors, assembled


def read(path: Path) -> SAE:
    """The SAE; ValueError for a damaged file or another activation than ReLU."""
    found = read_pt(path)
    tensors = Tensors(path, found)
    W_enc = tensors.take("encoder.weight", None, None)
    d_sae, d_in = W_enc.shape
    activation = found.get("activation", "ReLU")
    if activation != "ReLU":
        why = ", which normalises each token" if activation == "TopK" else ""
        raise ValueError(f"{path}: activation must be ReLU, got {activation!r}{why}")
    return assembled(
        ReLU(l1_coef=0.0),
        W_enc,
        tensors.take("latent_bias", d_sae),
        tensors.take("decoder.weight", d_in, d_sae).T,
        tensors.take("pre_bias", d_in),
    )
