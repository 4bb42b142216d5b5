"""SAEs of the installed libraries that `accelerate` knows, in float64, with a loss for each."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .peers import D_IN, D_SAE, NOT_CENTERED, K, dictionary_learning, randomized, sae_lens, sparsify


class Kind(NamedTuple):
    """How a library makes a module, and what it trains on: the loss of x, with dead latents."""

    make: Callable[[], Any]
    loss: Callable[[Any, Tensor, Tensor], Tensor]


def dead_latents() -> Tensor:
    return torch.arange(D_SAE) % 3 == 0


def coder(**settings: Any) -> Kind:
    def make() -> Any:
        library = sparsify()
        config = library.SparseCoderConfig(num_latents=D_SAE, k=K, **settings)
        return randomized(library.SparseCoder(D_IN, config)).double()

    def loss(sae: Any, x: Tensor, dead: Tensor) -> Tensor:
        out = sae(x, y=x.flip(1) if sae.cfg.transcode else None, dead_mask=dead)
        return out.fvu + out.auxk_loss / 32 + out.multi_topk_fvu / 8

    return Kind(make, loss)


def squared_error(sae: Any, x: Tensor, dead: Tensor) -> Tensor:
    """The loss of a training loop of one's own."""
    return (sae(x) - x).square().sum()


def lens(name: str, training: bool = False, **settings: Any) -> Kind:
    """With the loss of SAELens's own trainer, if that has one for the class."""

    def make() -> Any:
        saes = sae_lens()
        full = name if "Transcoder" in name else f"{name}TrainingSAE" if training else f"{name}SAE"
        config = getattr(saes, f"{full}Config")(d_in=D_IN, d_sae=D_SAE, dtype="float64", **settings)
        return randomized(getattr(saes, full)(config))

    def loss(sae: Any, x: Tensor, dead: Tensor) -> Tensor:
        inputs = sae_lens().sae.TrainStepInput(
            sae_in=x,
            coefficients={"l0": 0.3, "l1": 0.2},
            dead_neuron_mask=dead,
            n_training_steps=1,
            is_logging_step=False,
        )
        return sae.training_forward_pass(inputs).loss

    return Kind(make, loss if training else squared_error)


def transcoder(name: str) -> Kind:
    return lens(name, d_out=D_IN, **NOT_CENTERED)


def dictionary(
    module: str,
    name: str,
    *arguments: Any,
    loss: Callable[[Any, Tensor, Tensor], Tensor] = squared_error,
) -> Kind:
    """A class without a loss is trained as any module is; the others as their trainers do."""

    def make() -> Any:
        sae = getattr(dictionary_learning(module), name)(D_IN, D_SAE, *arguments)
        return randomized(sae).double()

    return Kind(make, loss)


def aux_k(sae: Any, x: Tensor, dead: Tensor) -> Tensor:
    """The loss of TopK and BatchTopK, and of the first of nested reconstructions."""
    topk = type(sae).__name__.endswith("TopK")
    active = {"return_topk": True} if topk else {"return_active": True}
    f, *_, post = sae.encode(x, use_threshold=False, **active)
    error = x - sae.decode(f)
    largest = post.where(dead, -torch.inf).topk(3)
    aux = torch.zeros_like(post).scatter(1, largest.indices, largest.values)
    W_dec = sae.W_dec if hasattr(sae, "W_dec") else sae.decoder.weight.T
    loss = error.square().mean() + (aux @ W_dec - error.detach()).square().mean() / 32
    nested = f[:, : D_SAE // 4] @ W_dec[: D_SAE // 4] if hasattr(sae, "group_sizes") else error
    return loss + (x - nested).square().mean()


def l1(sae: Any, x: Tensor, dead: Tensor) -> Tensor:
    recon, f = sae(x, output_features=True)
    return (x - recon).square().mean() + 0.1 * f.norm(p=1, dim=-1).mean()


def gated(sae: Any, x: Tensor, dead: Tensor) -> Tensor:
    f, gate = sae.encode(x, return_gate=True)
    recon = gate @ sae.decoder.weight.detach().T + sae.decoder_bias.detach()
    error = (x - sae.decode(f)).square().mean() + (x - recon).square().mean()
    return error + 0.1 * gate.norm(p=1, dim=-1).mean()


TOPK, BATCHTOPK = "trainers.top_k", "trainers.batch_top_k"
MATRYOSHKA = "trainers.matryoshka_batch_top_k"
WIDTHS = {"matryoshka_widths": [D_SAE // 4, D_SAE // 2, D_SAE]}
KINDS = {
    "sparsify": coder(),
    "sparsify, multi-k": coder(multi_topk=True),
    "sparsify transcoder": coder(transcode=True, skip_connection=True),
    "sparsify groupmax": coder(activation="groupmax"),
    "sae_lens standard": lens("Standard"),
    "sae_lens topk": lens("TopK", k=K),
    "sae_lens topk, not centered": lens("TopK", k=K, apply_b_dec_to_input=False),
    "sae_lens topk by norm": lens("TopK", k=K, rescale_acts_by_decoder_norm=True),
    "sae_lens topk, layer norm": lens("TopK", k=K, normalize_activations="layer_norm"),
    "sae_lens abstopk": lens("AbsTopK", k=K),
    "sae_lens jumprelu": lens("JumpReLU"),
    "sae_lens gated": lens("Gated"),
    "sae_lens transcoder": transcoder("Transcoder"),
    "sae_lens skip transcoder": transcoder("SkipTranscoder"),
    "sae_lens jumprelu transcoder": transcoder("JumpReLUTranscoder"),
    "sae_lens jumprelu skip transcoder": transcoder("JumpReLUSkipTranscoder"),
    "sae_lens standard training": lens("Standard", True),
    "sae_lens standard training, p": lens("Standard", True, lp_norm=0.7),
    "sae_lens topk training": lens("TopK", True, k=K),
    "sae_lens topk training, sparse": lens("TopK", True, k=K, use_sparse_activations=True),
    "sae_lens topk training, plain": lens("TopK", True, k=K, rescale_acts_by_decoder_norm=False),
    "sae_lens abstopk training": lens("AbsTopK", True, k=K),
    "sae_lens batchtopk training": lens("BatchTopK", True, k=K + 0.5),
    "sae_lens matryoshka training": lens("MatryoshkaBatchTopK", True, k=float(K), **WIDTHS),
    "sae_lens matryoshka training, aux": lens(
        "MatryoshkaBatchTopK", True, k=float(K), use_matryoshka_aux_loss=True, **WIDTHS
    ),
    "sae_lens jumprelu training": lens("JumpReLU", True, jumprelu_bandwidth=0.5),
    "sae_lens jumprelu training, wide": lens("JumpReLU", True, jumprelu_bandwidth=3.0),
    "sae_lens jumprelu training, to inputs": lens(
        "JumpReLU", True, jumprelu_bandwidth=0.5, jumprelu_ste_to_input=True
    ),
    "sae_lens jumprelu training, tanh": lens(
        "JumpReLU", True, jumprelu_sparsity_loss_mode="tanh", pre_act_loss_coefficient=0.1
    ),
    "sae_lens gated training": lens("Gated", True),
    "dictionary_learning topk": dictionary(TOPK, "AutoEncoderTopK", K, loss=aux_k),
    "dictionary_learning batchtopk": dictionary(BATCHTOPK, "BatchTopKSAE", K, loss=aux_k),
    "dictionary_learning matryoshka": dictionary(
        MATRYOSHKA, "MatryoshkaBatchTopKSAE", K, [D_SAE // 4, D_SAE - D_SAE // 4], loss=aux_k
    ),
    "dictionary_learning relu": dictionary("dictionary", "AutoEncoder", loss=l1),
    "dictionary_learning new relu": dictionary("dictionary", "AutoEncoderNew"),
    "dictionary_learning gated": dictionary("dictionary", "GatedAutoEncoder", loss=gated),
    "dictionary_learning jumprelu": dictionary("dictionary", "JumpReluAutoEncoder"),
}


def recon_and_codes(sae: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of any of them, dense."""
    found, out = sae.encode(x), sae(x)
    if hasattr(found, "top_acts"):  # sparsify
        dense = found.top_acts.new_zeros(len(x), D_SAE)
        return out.sae_out, dense.scatter_add(1, found.top_indices, found.top_acts)
    return out, found.to_dense() if found.is_sparse else found


def with_true_gradients(sae: Any) -> Any:
    """The module itself, except sparsify's, whose encoder is written plainly, and for sparse
    tensors, through which SAELens has no backward pass."""
    if type(sae).__name__ == "TopKTrainingSAE":
        sae.activation_fn.use_sparse_activations = False
    if type(sae).__name__ != "SparseCoder":
        return sae
    output = type(sae.encode(torch.zeros(1, D_IN, dtype=torch.float64)))

    def encode(x: Tensor) -> Any:
        post = sae.encoder(x if sae.cfg.transcode else x - sae.b_dec).relu()
        if sae.cfg.activation == "groupmax":
            top = post.unflatten(1, (K, -1)).max(-1)
            return output(top.values, top.indices + torch.arange(0, D_SAE, D_SAE // K), post)
        top = post.topk(K, sorted=False)
        return output(top.values, top.indices, post)

    sae.encode = encode
    return sae
