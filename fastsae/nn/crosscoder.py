"""The crosscoder: one dictionary for several layers of a model (Lindsey et al. 2024).

    h = sum_l (x_l - b_dec_l) W_enc_l^T + b_enc,    recon_l = codes W_dec_l + b_dec_l

With the layers side by side this is an SAE of width layers * d_in. What makes it a crosscoder is
that a latent counts by the sum of its decoder rows' norms in each layer, in its penalty as in the
original and in the choice of the largest (BatchTopK crosscoders, arXiv:2504.02922).
"""

from .activation import Activation
from .sae import SAE


def Crosscoder(d_in: int, layers: int, d_sae: int, activation: Activation) -> SAE:
    """An SAE of `layers` activations of width d_in each, in rows [layers * d_in].

    `sae.decoder_norms()` [d_sae, layers] says how much a latent writes to which layer.
    """
    return SAE(layers * d_in, d_sae, activation, layers=layers, by_norm=True)
