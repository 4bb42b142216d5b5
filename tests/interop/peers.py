"""SAEs of the installed libraries with random weights, written by them, read by them."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

D_IN, D_SAE, K = 12, 40, 5


def sae_lens() -> Any:
    return pytest.importorskip("sae_lens.saes")


def sparsify() -> Any:
    return pytest.importorskip("sparsify")


def dictionary_learning(module: str) -> Any:
    pytest.importorskip("dictionary_learning")
    return pytest.importorskip(f"dictionary_learning.{module}")


def randomised(module: Any) -> Any:
    """With every parameter away from where it starts; thresholds above 0."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.3 * noise)
            if "threshold" in name:
                parameter.copy_(0.2 + 0.1 * noise.abs())
    return module


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
        return randomised(cls(cfg(d_in=D_IN, d_sae=D_SAE, **settings)))

    return Peer(
        make,
        lambda sae, path: sae.save_model(path),
        lambda path: sae_lens().SAE.load_from_disk(path),
        lambda sae, x: sae(x),
        lambda sae, x: sae.encode(x),
    )


def coder(**settings: Any) -> Peer:
    def make() -> Any:
        library = sparsify()
        return randomised(
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
        return randomised(sae)

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


NOT_CENTRED = {"apply_b_dec_to_input": False}
PEERS = {
    "sae_lens topk": lens("TopK", k=K),
    "sae_lens topk, not centred": lens("TopK", k=K, **NOT_CENTRED),
    "sae_lens topk by norm": lens("TopK", k=K, rescale_acts_by_decoder_norm=True),
    "sae_lens abstopk": lens("AbsTopK", k=K),
    "sae_lens jumprelu": lens("JumpReLU"),
    "sae_lens jumprelu, not centred": lens("JumpReLU", **NOT_CENTRED),
    "sae_lens standard": lens("Standard"),
    "sae_lens gated": lens("Gated"),
    "sae_lens gated, not centred": lens("Gated", **NOT_CENTRED),
    "sae_lens transcoder": lens("Transcoder", d_out=9, **NOT_CENTRED),
    "sae_lens skip transcoder": lens("SkipTranscoder", d_out=9, **NOT_CENTRED),
    "sae_lens jumprelu transcoder": lens("JumpReLUTranscoder", d_out=9, **NOT_CENTRED),
    "sae_lens jumprelu skip": lens("JumpReLUSkipTranscoder", d_out=9, **NOT_CENTRED),
    "sae_lens in bfloat16": lens("TopK", k=K, dtype="bfloat16"),
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
}
READERS = {
    "sae_lens": PEERS["sae_lens topk"],
    "sparsify": PEERS["sparsify"],
    "dictionary_learning": PEERS["dictionary_learning topk"],
}
