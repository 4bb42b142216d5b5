"""SAEs of the installed libraries with random weights, written by them, read by them."""

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

D_IN, D_SAE, K = 12, 40, 5


def sae_lens() -> Any:
    return pytest.importorskip("sae_lens.saes")


def sparsify() -> Any:
    """Without a GPU, without its Triton kernels: in Triton's interpreter, their decode reads
    weights that are not contiguous in the wrong order."""
    if not torch.cuda.is_available():
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    return pytest.importorskip("sparsify")


def dictionary_learning(module: str) -> Any:
    pytest.importorskip("dictionary_learning")
    return pytest.importorskip(f"dictionary_learning.{module}")


def randomized(module: Any) -> Any:
    """With every parameter away from where it starts; thresholds above 0."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.3 * noise)
            if "threshold" in name:
                parameter.copy_(0.2 + 0.1 * noise.abs())
    return module


def llamascopium() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("llamascopium.models.sae")


class Peer(NamedTuple):
    """How a library makes, writes and reads one kind of SAE, and its reconstruction and codes."""

    make: Callable[[], Any]
    write: Callable[[Any, Path], object]
    read: Callable[[Path], Any]
    recon: Callable[[Any, Tensor], Tensor]
    codes: Callable[[Any, Tensor], Tensor]


def lens(name: str, **settings: Any) -> Peer:
    def make() -> Any:
        saes = sae_lens()
        full = name if "Transcoder" in name else f"{name}SAE"
        cls, cfg = getattr(saes, full), getattr(saes, f"{full}Config")
        sae = randomized(cls(cfg(d_in=D_IN, d_sae=D_SAE, **settings)))
        if "BatchTopK" in name:
            sae.topk_threshold.fill_(0.4)
        return sae

    return Peer(
        make,
        lambda sae, path: sae.save_model(path),
        lambda path: sae_lens().SAE.load_from_disk(path),
        lambda sae, x: sae(x),
        lambda sae, x: sae.encode(x),
    )


def inferred(peer: Peer) -> Peer:
    """What a training SAE writes for inference."""
    return peer._replace(write=lambda sae, path: sae.save_inference_model(path))


def in_training(peer: Peer) -> Peer:
    """What a BatchTopK in training writes of itself, which is read for training alone: outside it,
    it is the JumpReLU that it writes then."""

    def read(path: Path) -> Any:
        sae_lens().TrainingSAE.load_from_disk(path).save_inference_model(path / "inference")
        return peer.read(path / "inference")

    return peer._replace(read=read)


def before_6(peer: Peer, **changes: Any) -> Peer:
    """The file as SAELens 3 to 5 wrote it, whose config was that of a run."""

    def write(sae: Any, path: Path) -> None:
        path.mkdir()
        state = {**sae.state_dict(), "scaling_factor": torch.ones(D_SAE)}
        save_file(state, path / "sae_weights.safetensors")
        config = {
            "architecture": "standard",
            "d_in": D_IN,
            "d_sae": D_SAE,
            "activation_fn_str": "relu",
            "activation_fn_kwargs": {},
            "apply_b_dec_to_input": True,
            "finetuning_scaling_factor": False,
            "normalize_activations": "none",
            "dtype": "torch.float32",
            "device": "cpu",
            "model_name": "gpt2-small",
            "hook_name": "blocks.6.hook_resid_pre",
            "hook_layer": 6,
            "hook_head_index": None,
            "prepend_bos": True,
            "context_size": 128,
            "dataset_path": "Skylion007/openwebtext",
            "dataset_trust_remote_code": True,
            "sae_lens_training_version": None,
            "neuronpedia_id": None,
        }
        config = {n: v for n, v in (config | changes).items() if v is not ...}
        (path / "cfg.json").write_text(json.dumps(config))

    return peer._replace(write=write)


def coder(**settings: Any) -> Peer:
    def make() -> Any:
        library = sparsify()
        return randomized(
            library.SparseCoder(D_IN, library.SparseCoderConfig(num_latents=D_SAE, k=K, **settings))
        )

    return Peer(
        make,
        lambda sae, path: sae.save_to_disk(path),
        lambda path: sparsify().SparseCoder.load_from_disk(path),
        lambda sae, x: sae(x).sae_out,
        lambda sae, x: scattered(sae.encode(x)),
    )


def scattered(found: Any) -> Tensor:
    """Dense codes."""
    return torch.zeros(len(found.top_acts), D_SAE).scatter(1, found.top_indices, found.top_acts)


def dictionary(module: str, name: str, *arguments: Any, threshold: float | None = None) -> Peer:
    def make() -> Any:
        sae = getattr(dictionary_learning(module), name)(D_IN, D_SAE, *arguments)
        if threshold is not None:
            sae.threshold.fill_(threshold)
        return randomized(sae)

    def write(sae: nn.Module, path: Path) -> None:
        path.mkdir()
        torch.save(sae.state_dict(), path / "ae.pt")
        trainer = {"dict_class": name, "k": K, "activation_dim": D_IN, "dict_size": D_SAE}
        (path / "config.json").write_text(json.dumps({"trainer": trainer}))

    def read(path: Path) -> Any:
        utils = dictionary_learning("utils")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sae, _ = utils.load_dictionary(str(path), device="cpu")
        return sae

    return Peer(make, write, read, lambda sae, x: sae(x), lambda sae, x: sae.encode(x))


def scope(act_fn: str, out: str = "resid", **settings: Any) -> Peer:
    """It scales activations to a mean norm; here, codes are those of activations as they are, times
    the norm of their decoder row if that decides which are active."""
    hooks = {"hook_point_in": "resid", "hook_point_out": out}
    selects = act_fn == "topk" and settings.get("sparsity_include_decoder_norm", True)

    def make() -> Any:
        library = llamascopium()
        size = {"d_model": D_IN, "expansion_factor": D_SAE / D_IN, "top_k": K}
        sae = library.SparseAutoEncoder(
            library.SAEConfig(act_fn=act_fn, **size, **hooks, **settings)
        )
        for parameter in sae.parameters():  # which it leaves uninitialized
            parameter.data.zero_()
        sae.set_dataset_average_activation_norm({"resid": 5.0, out: 5.0 if out == "resid" else 2.0})
        return randomized(sae)

    def write(sae: Any, path: Path) -> None:
        sae.save_pretrained(path)
        sae.cfg.save_hyperparameters(path)

    def codes(sae: Any, x: Tensor) -> Tensor:
        scale = sae.compute_norm_factor(x, "resid")
        found = sae.encode(x * scale) / scale
        return found * sae.decoder_norm() if selects else found

    def recon(sae: Any, x: Tensor) -> Tensor:
        hook = sae.cfg.hook_point_out
        scale = sae.compute_norm_factor(x, sae.cfg.hook_point_in)
        return sae(x * scale) / sae.compute_norm_factor(x, hook)

    return Peer(
        make,
        write,
        lambda path: llamascopium().SparseAutoEncoder.from_pretrained(str(path)),
        recon,
        codes,
    )


def in_heads(peer: Peer, heads: int) -> Peer:
    """One that SAELens gives activations with a dimension of heads, which are side by side here."""

    def parted(x: Tensor) -> Tensor:
        return x.unflatten(1, (heads, -1))

    return peer._replace(
        recon=lambda sae, x: peer.recon(sae, parted(x)).flatten(1),
        codes=lambda sae, x: peer.codes(sae, parted(x)),
    )


NOT_CENTERED = {"apply_b_dec_to_input": False}
NORMED = {"normalize_activations": "layer_norm"}
BATCHED = lens("BatchTopKTraining", k=float(K))
BETWEEN = lens("BatchTopKTraining", k=K + 0.5)
NESTED = lens("MatryoshkaBatchTopKTraining", k=float(K), matryoshka_widths=[10, D_SAE])
PEERS = {
    "sae_lens topk": lens("TopK", k=K),
    "sae_lens topk, not centered": lens("TopK", k=K, **NOT_CENTERED),
    "sae_lens topk by norm": lens("TopK", k=K, rescale_acts_by_decoder_norm=True),
    "sae_lens abstopk": lens("AbsTopK", k=K),
    "sae_lens jumprelu": lens("JumpReLU"),
    "sae_lens jumprelu, not centered": lens("JumpReLU", **NOT_CENTERED),
    "sae_lens standard": lens("Standard"),
    "sae_lens gated": lens("Gated"),
    "sae_lens gated, not centered": lens("Gated", **NOT_CENTERED),
    "sae_lens transcoder": lens("Transcoder", d_out=9, **NOT_CENTERED),
    "sae_lens skip transcoder": lens("SkipTranscoder", d_out=9, **NOT_CENTERED),
    "sae_lens jumprelu transcoder": lens("JumpReLUTranscoder", d_out=9, **NOT_CENTERED),
    "sae_lens jumprelu skip": lens("JumpReLUSkipTranscoder", d_out=9, **NOT_CENTERED),
    "sae_lens in bfloat16": lens("TopK", k=K, dtype="bfloat16"),
    "sae_lens topk, layer norm": lens("TopK", k=K, **NORMED),
    "sae_lens topk by norm, layer norm": lens(
        "TopK", k=K, rescale_acts_by_decoder_norm=True, **NORMED
    ),
    "sae_lens jumprelu, layer norm, not centered": lens("JumpReLU", **NORMED, **NOT_CENTERED),
    "sae_lens standard, layer norm": lens("Standard", **NORMED),
    "sae_lens gated, layer norm": lens("Gated", **NORMED),
    "sae_lens whitened": lens("TopK", k=K, normalize_activations="covariance_whitening"),
    "sae_lens training topk": lens("TopKTraining", k=K),
    "sae_lens training topk, layer norm": lens("TopKTraining", k=K, **NORMED),
    "sae_lens trained topk": inferred(lens("TopKTraining", k=K)),
    "sae_lens training abstopk": lens("AbsTopKTraining", k=K),
    "sae_lens training batchtopk": in_training(BATCHED),
    "sae_lens trained batchtopk": inferred(BATCHED),
    "sae_lens training batchtopk, k of 5.5": in_training(BETWEEN),
    "sae_lens training matryoshka": in_training(NESTED),
    "sae_lens trained matryoshka": inferred(NESTED),
    "sae_lens training jumprelu": lens("JumpReLUTraining"),
    "sae_lens trained jumprelu": inferred(lens("JumpReLUTraining")),
    "sae_lens training standard": lens("StandardTraining"),
    "sae_lens training gated": lens("GatedTraining"),
    "sae_lens 5 standard": before_6(lens("Standard")),
    "sae_lens 5 topk": before_6(
        lens("TopK", k=K), activation_fn_str="topk", activation_fn_kwargs={"k": K}
    ),
    "sae_lens 5 jumprelu": before_6(lens("JumpReLU"), architecture="jumprelu"),
    "sae_lens 5 gated": before_6(lens("Gated"), architecture="gated"),
    "sae_lens 5 layer norm": before_6(lens("Standard"), normalize_activations="layer_norm"),
    "sae_lens 5 not centered": before_6(lens("Standard"), **NOT_CENTERED),
    "sae_lens hook_z": in_heads(lens("Standard", reshape_activations="hook_z"), 3),
    "sae_lens 5 hook_z": in_heads(before_6(lens("Standard"), hook_name="attn.hook_z"), 3),
    "sae_lens 2": before_6(lens("Standard"), architecture=..., normalize_activations=True),
    "sparsify": coder(),
    "sparsify transcoder": coder(transcode=True),
    "sparsify skip transcoder": coder(transcode=True, skip_connection=True),
    "sparsify skip": coder(skip_connection=True),
    "dictionary_learning topk": dictionary("trainers.top_k", "AutoEncoderTopK", K),
    "dictionary_learning batchtopk": dictionary(
        "trainers.batch_top_k", "BatchTopKSAE", K, threshold=0.4
    ),
    "dictionary_learning matryoshka": dictionary(
        "trainers.matryoshka_batch_top_k",
        "MatryoshkaBatchTopKSAE",
        K,
        [10, D_SAE - 10],
        threshold=0.4,
    ),
    "dictionary_learning jumprelu": dictionary("dictionary", "JumpReluAutoEncoder"),
    "dictionary_learning relu": dictionary("dictionary", "AutoEncoder"),
    "dictionary_learning new relu": dictionary("dictionary", "AutoEncoderNew"),
    "dictionary_learning gated": dictionary("dictionary", "GatedAutoEncoder"),
    "llamascopium topk": scope("topk", sparsity_include_decoder_norm=False),
    "llamascopium topk by norm": scope("topk"),
    "llamascopium jumprelu": scope("jumprelu"),
    "llamascopium relu": scope("relu", use_decoder_bias=False),
    "llamascopium scaled already": scope("jumprelu", norm_activation="inference"),
    "llamascopium transcoder": scope("relu", "mlp_out"),
    "llamascopium jumprelu transcoder": scope("jumprelu", "mlp_out"),
}
READERS = {
    "sae_lens": PEERS["sae_lens topk"],
    "sparsify": PEERS["sparsify"],
    "dictionary_learning": PEERS["dictionary_learning topk"],
    "llamascopium": PEERS["llamascopium topk"],
}
