"""OpenAI's files; what is recognized, kept and refused; and what a config records."""

import json
from collections import OrderedDict
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import linear

import fastsae
from fastsae import SAE, AbsTopK, Crosscoder, JumpReLU, Rational, TopK, interop
from fastsae.files import read_tensors
from fastsae.nn import Activation
from fastsae.nn.batchtopk import BatchTopK
from fastsae.nn.gated import Gated
from fastsae.nn.relu import ReLU
from fastsae.nn.variational import Variational

D_IN, D_SAE, K = 12, 40, 5
WEIGHTS = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}


def weights() -> dict[str, torch.Tensor]:
    return {name: 0.4 * torch.randn(size) for name, size in WEIGHTS.items()}


def openai_state(W: dict[str, torch.Tensor]) -> dict[str, Any]:
    """As `Autoencoder.state_dict` of their sparse_autoencoder/model.py."""
    return {
        "pre_bias": W["b_dec"],
        "encoder.weight": W["W_enc"].T.contiguous(),
        "latent_bias": W["b_enc"],
        "decoder.weight": W["W_dec"].T.contiguous(),
        "stats_last_nonzero": torch.zeros(D_SAE, dtype=torch.long),
        "latents_activation_frequency": torch.ones(D_SAE),
        "latents_mean_square": torch.zeros(D_SAE),
        "activation": "ReLU",
        "activation_state_dict": OrderedDict(),
    }


def test_openai_relu(tmp_path):
    W, x = weights(), torch.randn(50, D_IN)
    path = tmp_path / "layer-6.pt"
    torch.save(openai_state(W), path)
    codes = linear(x - W["b_dec"], W["W_enc"].T, W["b_enc"]).relu()
    torch.testing.assert_close(fastsae.load(path)(x), codes @ W["W_dec"] + W["b_dec"])


def test_openai_topk(tmp_path):
    """Which normalizes each token: that is kept in files of ours and of SAELens."""
    W, x = weights(), 3 * torch.randn(50, D_IN) + torch.randn(50, 1)
    path = tmp_path / "layer-6.pt"
    own = OrderedDict(k=K, postact_fn="ReLU")
    torch.save(openai_state(W) | {"activation": "TopK", "activation_state_dict": own}, path)
    mean, deviation = x.mean(1, keepdim=True), x.std(1, keepdim=True)
    z = (x - mean) / (deviation + 1e-5)
    kept = linear(z - W["b_dec"], W["W_enc"].T, W["b_enc"]).topk(K)
    codes = torch.zeros(50, D_SAE).scatter(1, kept.indices, kept.values.relu())
    recon = (codes @ W["W_dec"] + W["b_dec"]) * deviation + mean
    sae = fastsae.load(path)
    sae.save(tmp_path / "fastsae")
    interop.save(sae, tmp_path / "sae_lens", "sae_lens")
    for again in (sae, fastsae.load(tmp_path / "fastsae"), fastsae.load(tmp_path / "sae_lens")):
        torch.testing.assert_close(again(x), recon)
        torch.testing.assert_close(again.encode(x).to_dense(), codes)
    for form in ("sparsify", "dictionary_learning"):
        with pytest.raises(ValueError, match=f"{form} does not support layer_norm"):
            interop.save(sae, tmp_path / form, form)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "GELU"}, "activation must be ReLU or TopK, got 'GELU'"),
        ({"activation": "TopK"}, r"must have k and postact_fn 'ReLU', got {}"),
        (
            {"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "Identity"}},
            "must have k and postact_fn 'ReLU', got .*Identity",
        ),
        (
            {"activation": "TopK", "activation_state_dict": {"k": "5", "postact_fn": "ReLU"}},
            "k must be of type int, got '5'",
        ),
        (
            {"activation": "TopK", "activation_state_dict": {"k": 41, "postact_fn": "ReLU"}},
            "k must be between 1 and d_sae = 40, got 41",
        ),
    ],
    ids=str,
)
def test_an_openai_activation_that_is_not_here(changes, message, tmp_path):
    torch.save(openai_state(weights()) | changes, tmp_path / "sae.pt")
    with pytest.raises(ValueError, match=message) as caught:
        fastsae.load(tmp_path / "sae.pt")
    assert str(tmp_path / "sae.pt") in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_fn_str": "tanh-relu"}, "activation_fn must be relu or topk, got 'tanh-relu'"),
        ({"activation_fn": "topk"}, "k must be of type int, got None"),
        ({"activation_fn": "topk", "activation_fn_kwargs": {"k": 0}}, "k must be at least 1, got"),
        ({"architecture": "matching_pursuit"}, "architecture must be one of .*'matching_pursuit'"),
        ({"normalize_activations": "constant_norm_rescale"}, "must be one of none, layer_norm, "),
        (
            {"architecture": "transcoder", "d_out": D_IN, "normalize_activations": "layer_norm"},
            "a transcoder with layer_norm is not supported",
        ),
    ],
    ids=str,
)
def test_a_sae_lens_config_that_is_not_honored(changes, message, tmp_path):
    interop.save(SAE(D_IN, D_SAE, ReLU(l1_coef=0.0)), tmp_path, "sae_lens")
    path = tmp_path / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message) as caught:
        fastsae.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_sae_lens_finetuned_by_factors(tmp_path):
    interop.save(SAE(D_IN, D_SAE, TopK(K)), tmp_path, "sae_lens")
    path = tmp_path / "sae_weights.safetensors"
    tensors = read_tensors(path)
    save_file({**tensors, "scaling_factor": torch.ones(D_SAE)}, path)
    assert fastsae.load(tmp_path).d_sae == D_SAE
    save_file({**tensors, "scaling_factor": torch.full((D_SAE,), 1.1)}, path)
    with pytest.raises(ValueError, match="a scaling_factor other than 1 is not supported"):
        fastsae.load(tmp_path)


@pytest.mark.parametrize("form", interop.WRITABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_precision_is_kept(form, dtype, tmp_path):
    sae = SAE(D_IN, D_SAE, TopK(K)).to(dtype)
    interop.save(sae, tmp_path / "out", form)
    again = fastsae.load(tmp_path / "out")
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert torch.equal(getattr(again, name), getattr(sae, name))


def test_thresholds_of_bfloat16_survive_their_logarithm(tmp_path):
    sae = SAE(D_IN, D_SAE, JumpReLU(l0_coef=0.0))
    thresholds = torch.logspace(-3, 1, D_SAE).bfloat16()
    state = {**sae.state_dict(), "activation.threshold": thresholds}
    sae.load_state_dict(state)
    interop.save(sae.bfloat16(), tmp_path, "llamascopium")
    again = fastsae.load(tmp_path).state_dict()
    assert torch.equal(again["activation.threshold"], thresholds)


def test_norms_are_folded_into_the_weights(tmp_path):
    sae, x = SAE(D_IN, D_SAE, TopK(K), by_norm=True), torch.randn(50, D_IN)
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.2, 3, D_SAE)[:, None])
    for form in ("sae_lens", "sparsify", "dictionary_learning"):
        interop.save(sae, tmp_path / form, form)
        again = fastsae.load(tmp_path / form)
        assert not again.by_norm
        torch.testing.assert_close(again(x), sae(x))
        torch.testing.assert_close(again.encode(x).to_dense(), sae.encode(x).to_dense())
    assert sae.by_norm, "the SAE itself stays as it is"


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        (Rational(k=K), "supports rational"),
        (BatchTopK(K), "batchtopk that has no threshold yet"),
        (BatchTopK(K, by="abs"), "batchtopk that ranks magnitudes"),
    ],
    ids=["rational", "batchtopk", "batchabstopk"],
)
@pytest.mark.parametrize("form", interop.WRITABLE[1:])
def test_what_no_other_library_has(form, activation: Activation, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        interop.save(SAE(D_IN, D_SAE, activation), tmp_path / "out", form)
    with pytest.raises(ValueError, match="does not support crosscoders"):
        interop.save(Crosscoder(2, 6, D_SAE, ReLU(l1_coef=0.0)), tmp_path / "out", form)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("form", "activation", "message"),
    [
        ("sparsify", AbsTopK(K), "sparsify supports topk, not abstopk"),
        ("sparsify", JumpReLU(), "sparsify supports topk, not jumprelu"),
        ("dictionary_learning", AbsTopK(K), "supports topk, batchtopk, .*, not abstopk"),
    ],
    ids=str,
)
def test_what_one_library_has_not(form, activation: Activation, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        interop.save(SAE(D_IN, D_SAE, activation), tmp_path / "out", form)


def test_what_counts_is_what_an_activation_does_outside_training(tmp_path):
    x = torch.randn(50, D_IN)
    for activation in (Variational(K), TopK(K, gradient="rotation"), Gated(l1_coef=0.0)):
        sae = SAE(D_IN, D_SAE, activation).eval()
        interop.save(sae, tmp_path / activation.cfg.name, "sae_lens")
        torch.testing.assert_close(fastsae.load(tmp_path / activation.cfg.name)(x), sae(x))


def test_a_form_that_is_not_one(tmp_path):
    with pytest.raises(
        ValueError, match="the format must be one of fastsae, sae_lens, .*, got 'onnx'"
    ):
        interop.save(SAE(D_IN, D_SAE, TopK(K)), tmp_path, "onnx")


def test_nothing_to_recognize(tmp_path):
    with pytest.raises(ValueError, match=r"holds no SAE: it must have config.json and sae.safe"):
        fastsae.load(tmp_path)
    for name in ("sae.safetensors", "ae.pt"):
        (tmp_path / name).touch()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        ValueError, match="has files of fastsae and dictionary_learning, but its co"
    ):
        fastsae.load(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="holds no SAE"):
        fastsae.load(tmp_path / "notes.txt")
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)  # as of dictionary_learning, too
    with pytest.raises(ValueError, match="run holds no SAE: it must have"):
        fastsae.load(tmp_path / "run")
    (checkpoints / "step-00000000").mkdir()
    with pytest.raises(ValueError, match="run holds no SAE yet: finish its run with --resume"):
        fastsae.load(tmp_path / "run")


def test_a_name_that_is_no_file_or_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # away from the checkout and its neighboring folders
    for name in ("nowhere", "../elsewhere", "/no/such/folder", "a/../b"):
        with pytest.raises(ValueError, match="does not exist"):
            fastsae.load(name)


def test_metadata_says_where_activations_came_from(tmp_path):
    about = {"model_name": "gpt2", "hook_name": "transformer.h.6"}
    interop.save(SAE(D_IN, D_SAE, TopK(K)), tmp_path, "sae_lens", **about)
    found = json.loads((tmp_path / "cfg.json").read_text())["metadata"]
    assert found == {"sae_lens_version": "6.0.0", "model_from_pretrained_kwargs": {}, **about}


def test_where_the_model_has_heads_sae_lens_is_told_to_concatenate_them(tmp_path):
    sae = SAE(D_IN, D_SAE, TopK(K))
    for name, reshaped in (("attn.hook_z", "hook_z"), ("hook_resid_post", "none")):
        interop.save(sae, tmp_path, "sae_lens", hook_name=f"blocks.3.{name}")
        config = json.loads((tmp_path / "cfg.json").read_text())
        assert config["reshape_activations"] == reshaped


def test_a_directory_of_several_formats_is_told_apart_by_settings_or_refused(tmp_path):
    sae = SAE(D_IN, D_SAE, TopK(K))
    interop.save(sae, tmp_path, "sae_lens")
    (tmp_path / "sae.safetensors").write_bytes(b"of sparsify, if there were one")
    assert torch.equal(fastsae.load(tmp_path).W_enc, sae.W_enc)
    sae.save(tmp_path)
    with pytest.raises(ValueError, match="holds SAEs of fastsae and sae_lens: load one by"):
        fastsae.load(tmp_path)
    for name in ("config.json", "cfg.json"):
        assert torch.equal(fastsae.load(tmp_path / name).W_enc, sae.W_enc)


def test_a_lone_state_dict_says_what_it_lacks(tmp_path):
    interop.save(SAE(D_IN, D_SAE, TopK(K)), tmp_path, "dictionary_learning")
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"dictionary_learning's ae.pt needs its config.json in"):
        fastsae.load(tmp_path / "ae.pt")
    torch.save(openai_state(weights()), tmp_path / "ae.pt")
    assert fastsae.load(tmp_path / "ae.pt").d_sae == D_SAE
