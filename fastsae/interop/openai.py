"""OpenAI's sparse_autoencoder (arXiv:2406.04093): one state dict in a .pt file of any name.

Their TopK SAEs normalize each token; their ReLU SAEs do not.
"""

from fastsae.files import shown
from fastsae.nn import SAE, Activation, ReLU, TopK

from .checkpoint_io import Config, Tensors, build_sae


def read(tensors: Tensors) -> SAE:
    """ValueError for other activations than ReLU and TopK."""
    if "latent_bias" not in tensors:
        raise ValueError(
            f"{tensors.path} is not a state dict of OpenAI's, as it lacks latent_bias; "
            "dictionary_learning's ae.pt needs its config.json in the same directory, and names of "
            "Qwen-Scope's files end in .sae.pt"
        )
    W_enc = tensors.take("encoder.weight", None, None)
    d_sae, d_in = W_enc.shape
    activation = activation_of(tensors)
    return build_sae(
        activation,
        W_enc,
        tensors.take("latent_bias", d_sae),
        tensors.take("decoder.weight", d_in, d_sae).T,
        tensors.take("pre_bias", d_in),
        layer_norm=isinstance(activation, TopK),
    )


def activation_of(tensors: Tensors) -> Activation:
    """The activation that a state dict names."""
    path, name = tensors.path, tensors.values.get("activation", "ReLU")
    if name == "ReLU":
        return ReLU(l1_coef=0.0)
    if name != "TopK":
        raise ValueError(f"{path}: activation must be ReLU or TopK, got {shown(name)}")
    state = tensors.values.get("activation_state_dict")
    if not isinstance(state, dict) or state.get("postact_fn") != "ReLU":
        raise ValueError(f"{path}: a TopK must have k and postact_fn 'ReLU', got {shown(state)}")
    return TopK(Config(path, state).take("k", int))
