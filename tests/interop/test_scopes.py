"""The SAEs of model families, in their files' exact layout: Gemma Scope 1 and 2, Qwen-Scope."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import fastsae
from fastsae import interop

D_IN, D_SAE, K = 12, 40, 5
WEIGHTS = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
HOOK = "model.layers.13.output"
CONFIG: dict[str, Any] = {
    "hf_hook_point_in": HOOK,
    "hf_hook_point_out": HOOK,
    "width": D_SAE,
    "model_name": "google/gemma-3-1b-pt",
    "architecture": "jump_relu",
    "l0": 60,
    "affine_connection": False,
    "type": "sae",
}


def weights() -> dict[str, Tensor]:
    found = {name: 0.4 * torch.randn(size) for name, size in WEIGHTS.items()}
    return found | {"threshold": 0.2 + 0.1 * torch.rand(D_SAE)}


def jumprelu(x: Tensor, W: dict[str, Tensor]) -> Tensor:
    """Their reconstruction: the encoder sees x as it is."""
    h = x @ W["W_enc"] + W["b_enc"]
    return (h * (h > W["threshold"])) @ W["W_dec"] + W["b_dec"]


def test_gemma_scope(tmp_path):
    W, x = weights(), torch.randn(50, D_IN)
    arrays = {name: value.numpy() for name, value in W.items()}
    np.savez(tmp_path / "params.npz", allow_pickle=False, **arrays)
    for source in (tmp_path, tmp_path / "params.npz"):
        torch.testing.assert_close(fastsae.load(source)(x), jumprelu(x, W))
    np.savez_compressed(tmp_path / "params.npz", allow_pickle=False, **arrays)
    torch.testing.assert_close(fastsae.load(tmp_path)(x), jumprelu(x, W))


def write_gemma_scope_2(folder: Path, W: dict[str, Tensor], **changes: Any) -> None:
    tensors = {name.replace("W_", "w_"): tensor for name, tensor in W.items()}
    save_file(tensors, folder / "params.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))


def test_gemma_scope_2(tmp_path):
    W, x = weights(), torch.randn(50, D_IN)
    write_gemma_scope_2(tmp_path, W)
    for source in (tmp_path, tmp_path / "params.safetensors", tmp_path / "config.json"):
        sae = fastsae.load(source)
        torch.testing.assert_close(sae(x), jumprelu(x, W))
    assert sae.d_out is None
    interop.save(sae, tmp_path / "lens", "sae_lens")
    torch.testing.assert_close(fastsae.load(tmp_path / "lens")(x), sae(x))


@pytest.mark.parametrize("affine", [False, True])
def test_a_transcoder_of_gemma_scope_2(affine, tmp_path):
    """Its skip connection is stored as x is multiplied by it, unlike other libraries'."""
    W, x, skip = weights(), torch.randn(50, D_IN), torch.randn(D_IN, D_IN)
    tensors = W | ({"affine_skip_connection": skip} if affine else {})
    write_gemma_scope_2(tmp_path, tensors, type="transcoder", affine_connection=affine)
    sae = fastsae.load(tmp_path)
    assert sae.d_out == D_IN
    torch.testing.assert_close(sae(x), jumprelu(x, W) + (x @ skip if affine else 0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "crosscoder"}, "type must be one of sae, transcoder, got 'crosscoder'"),
        ({"architecture": "topk"}, "architecture must be jump_relu, got 'topk'"),
        ({"width": 41}, r"w_enc must be \['any', 41\], got \[12, 40\]"),
        ({"affine_connection": True}, "lacks affine_skip_connection"),
        ({"affine_connection": True, "type": "transcoder"}, "lacks affine_skip_connection"),
    ],
    ids=str,
)
def test_what_is_not_an_sae_of_gemma_scope_2(changes, message, tmp_path):
    write_gemma_scope_2(tmp_path, weights(), **changes)
    with pytest.raises(ValueError, match=message) as caught:
        fastsae.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def write_qwen_scope(folder: Path, W: dict[str, Tensor]) -> Path:
    """Both matrices as those of torch.nn.Linear."""
    names = {"W_enc": W["W_enc"].T, "W_dec": W["W_dec"].T, "b_enc": W["b_enc"], "b_dec": W["b_dec"]}
    folder.mkdir(parents=True)
    path = folder / "layer3.sae.pt"
    torch.save({name: tensor.contiguous() for name, tensor in names.items()}, path)
    return path


def test_qwen_scope(tmp_path):
    """In the hub's cache, the name of the repository is further up."""
    W, x = weights(), torch.randn(50, D_IN)
    name = f"models--Qwen--SAE-Res-Qwen3-8B-Base-W64K-L0_{K}"
    path = write_qwen_scope(tmp_path / name / "snapshots" / "0a1b", W)
    kept = (x @ W["W_enc"] + W["b_enc"]).topk(K)
    codes = torch.zeros(50, D_SAE).scatter(1, kept.indices, kept.values)
    sae = fastsae.load(path)
    torch.testing.assert_close(sae.encode(x).to_dense(), codes)
    torch.testing.assert_close(sae(x), codes @ W["W_dec"] + W["b_dec"])


def test_a_qwen_scope_file_without_its_directory_lacks_k(tmp_path):
    path = write_qwen_scope(tmp_path / "elsewhere", weights())
    with pytest.raises(ValueError, match="layer3.sae.pt does not hold k: put it in a directory"):
        fastsae.load(path)
    other = path.rename(path.with_name("layer3.pt"))
    with pytest.raises(ValueError, match="names of Qwen-Scope's files end in .sae.pt"):
        fastsae.load(other)
