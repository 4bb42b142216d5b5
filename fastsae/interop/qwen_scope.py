"""Qwen-Scope (arXiv:2605.11887): TopK SAEs, one layerN.sae.pt per layer; the encoder sees x
uncentered.

A file does not hold k: the name of its repository does.
"""

import re

from fastsae.nn import SAE, TopK

from .checkpoint_io import Tensors, build_sae


def read(tensors: Tensors) -> SAE:
    """ValueError if no directory above the file is named after its L0."""
    found = re.findall(r"L0_(\d+)", tensors.path.absolute().parent.as_posix())
    if not found:
        raise ValueError(
            f"{tensors.path} does not hold k: put it in a directory that is named as its "
            "repository is, such as SAE-Res-Qwen3-8B-Base-W64K-L0_50"
        )
    W_enc = tensors.take("W_enc", None, None)
    d_sae, d_in = W_enc.shape
    return build_sae(
        TopK(int(found[-1])),
        W_enc,
        tensors.take("b_enc", d_sae),
        tensors.take("W_dec", d_in, d_sae).T,
        tensors.take("b_dec", d_in),
        centered=False,
    )
