"""The rational activation against a dense float64 reference, written out from the formula."""

import json
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import linear, normalize

import fastsae
from fastsae import SAE, TopK
from fastsae.data import ActivationShards, Synthetic
from fastsae.nn import Rational, RationalConfig
from fastsae.nn.activation import Weights
from fastsae.nn.jumprelu import JumpReLU
from fastsae.nn.rational import linear_fit
from fastsae.nn.rational_fit import JUMP, RationalFit
from fastsae.nn.relu import ReLU
from fastsae.train import Optimizer, TrainConfig, Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
N, D_IN, D_SAE, K = 50, 6, 20, 5
GATES = {"relu": {}, "jumprelu": {}, "topk": {"k": K}}
EVERY = pytest.mark.parametrize("gate", GATES)
SUPPORTS = pytest.mark.parametrize("support", ["teacher", "none"])


def build(gate, bias=0.0, **settings) -> SAE:
    """In float64, with every parameter away from where it starts."""
    torch.manual_seed(1)
    activation = Rational(gate=gate, **GATES[gate], **settings)
    sae = SAE(D_IN, D_SAE, activation).double()
    with torch.no_grad():
        sae.b_enc.normal_(bias, 0.1)
        activation.scale_change.normal_(0, 0.2)
        activation.change.normal_(0, 0.02)
        if gate == "jumprelu":
            activation.threshold.uniform_(0.1, 0.3)
    return sae


def reference(sae, x):
    """Codes [N, d_sae] from the formulas alone."""
    activation, h = sae.activation, linear(x, sae.W_enc, sae.b_enc)
    p, q = activation.degree
    largest = h.detach().relu().sort(1, descending=True).values
    s = {
        "relu": 0.0,
        "jumprelu": getattr(activation, "threshold", None),
        "topk": (largest[:, K - 1 : K] + largest[:, K : K + 1]) / 2,
    }[activation.cfg.gate]
    kept = (h >= largest[:, K - 1 : K]) & (h > 0) if activation.cfg.gate == "topk" else h > s
    s = 0.0 if activation.cfg.center == "zero" else s
    coefficients = activation.start + activation.unit * activation.change
    a, b = coefficients[: p + 1], coefficients[p + 1 :]
    c_in, c_out = activation.scale * activation.scale_change.exp()
    t = ((h - s) / c_in).clamp(-1, 1)
    P = sum(a[i] * t**i for i in range(p + 1))
    S = sum(b[j - 1] * t**j for j in range(1, q + 1))
    phi = c_out * P / (1 + abs(S))
    if activation.cfg.support == "none":
        return phi
    return phi.where(kept, 0.0)


WAYS = [(gate, {"support": support}) for gate in GATES for support in ("teacher", "none")]
AT_ZERO = [(gate, {"center": "zero"}) for gate in ("jumprelu", "topk")]


@pytest.mark.parametrize("bias", [0.0, -1.5], ids=["crowded", "sparse"])
@pytest.mark.parametrize(("gate", "settings"), WAYS + AT_ZERO)
def test_values_and_gradients(gate, settings, bias):
    sae = build(gate, bias, **settings)
    x = torch.randn(N, D_IN).double().requires_grad_()
    weight = torch.randn(N, D_SAE).double()
    codes = sae.activation.encode(x, sae.weights())
    expected = reference(sae, x)
    torch.testing.assert_close(codes.to_dense(), expected)
    assert torch.equal(codes.to_dense() != 0, expected != 0), "what is inactive is exactly 0"
    trained = dict(sae.named_parameters())
    inputs = [x, *(trained[n] for n in ("W_enc", "b_enc", "activation.change"))]
    inputs.append(trained["activation.scale_change"])
    got, wanted = (
        torch.autograd.grad((z * weight).sum(), inputs) for z in (codes.to_dense(), expected)
    )
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)
    assert all(gradient.abs().sum() > 0 for gradient in got)


@EVERY
def test_tokens_of_none_and_some_latents(gate):
    """No tokens; and tokens without an active latent, whose code is 0."""
    sae = build(gate)
    assert sae(torch.zeros(0, D_IN).double()).shape == (0, D_IN)
    with torch.no_grad():
        sae.b_enc.fill_(-100)
    codes = sae.encode(torch.randn(3, D_IN).double())
    assert codes.l0() == 0
    assert not codes.to_dense().any()


def test_as_many_latents_as_there_are():
    sae = SAE(D_IN, D_SAE, Rational(k=D_SAE))
    assert sae.encode(torch.randn(3, D_IN)).values.shape == (3, D_SAE)


@pytest.mark.parametrize(("gate", "most"), [("topk", K), ("relu", D_SAE - 1)])
def test_few_active_latents_are_listed_alone(gate, most):
    sae = build(gate, bias=-2.0)
    assert sae.encode(torch.randn(N, D_IN).double()).values.shape[1] <= most


def tokens() -> torch.Tensor:
    """Of mean square 1 each, so that no t is clamped: |h| <= |x| for rows of norm 1."""
    return 0.999 * math.sqrt(D_IN) * normalize(torch.randn(N, D_IN), dim=1)


@pytest.mark.parametrize(
    ("gate", "like"),
    [
        (Rational(gate="relu"), ReLU()),
        (Rational(gate="jumprelu"), JumpReLU(threshold=JUMP * math.sqrt(D_IN))),
        (Rational(gate="jumprelu", center="zero"), JumpReLU(threshold=JUMP * math.sqrt(D_IN))),
        (Rational(k=K, center="zero"), TopK(K)),
    ],
    ids=str,
)
def test_it_starts_as_its_gate(gate, like):
    sae, expected, x = SAE(D_IN, D_SAE, gate), SAE(D_IN, D_SAE, like), tokens()
    expected.W_enc = sae.W_enc
    torch.testing.assert_close(sae.encode(x).to_dense(), expected.encode(x).to_dense())


def test_it_starts_as_topk_less_the_tokens_own_threshold():
    sae, x = SAE(D_IN, D_SAE, Rational(k=K)), tokens()
    codes, h = sae.encode(x), linear(x, sae.W_enc)
    largest = h.sort(1, descending=True).values.relu()
    tau = (largest[:, K - 1 : K] + largest[:, K : K + 1]) / 2
    expected = (largest[:, :K] - tau + JUMP * math.sqrt(D_IN)).where(codes.active, 0.0)
    torch.testing.assert_close(codes.values, expected)


@pytest.mark.parametrize(
    ("degree", "error"), [((9, 8), 1e-12), ((1, 0), 1e-12), ((1, 1), 0.2), ((2, 8), 0.2)]
)
def test_a_start_of_any_degree(degree, error):
    fit = linear_fit(degree, 0.2)
    assert (len(fit.a) - 1, len(fit.b)) == degree
    assert fit.error < error


@EVERY
def test_without_support_it_starts_close_to_its_gate(gate):
    activation = Rational(gate=gate, support="none", **GATES[gate])
    sae, x = SAE(D_IN, D_SAE, activation), tokens()
    codes, h = sae.encode(x), linear(x, sae.W_enc)
    assert codes.values.shape == (N, D_SAE)
    found, s = activation.gated(x, sae.weights())
    size = math.sqrt(D_IN)
    far = ((h - s).abs() > 0.01 * size) & ((h - s).abs() < size)
    start = h - s + (0.0 if gate == "relu" else JUMP * size)
    expected = start.where(found.active, 0.0)
    error = (codes.values - expected)[far].abs().max() / size
    assert error < (0.025 if gate == "relu" else 1e-3)


@EVERY
@SUPPORTS
def test_saved_and_folded(tmp_path, gate, support):
    sae, x, scale = build(gate, support=support), torch.randn(N, D_IN).double(), 0.3
    with torch.no_grad():
        sae.b_dec.normal_()
    expected = sae(scale * x) / scale
    torch.testing.assert_close(sae.fold_scale_(scale)(x), expected)
    sae.save(tmp_path)
    again = fastsae.load(tmp_path)
    assert again.activation.cfg == sae.activation.cfg
    torch.testing.assert_close(dict(again.state_dict()), dict(sae.state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(
        again(x), sae(x)
    )  # a product's last bit depends on where its matrix lies


def test_the_degree_is_kept_with_the_config(tmp_path):
    sae = SAE(D_IN, D_SAE, Rational(gate="relu", degree=(5, 4)))
    sae.save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["activation"]["degree"] == [5, 4]
    assert fastsae.load(tmp_path).activation.cfg == sae.activation.cfg


@SUPPORTS
@EVERY
def test_a_unit_of_change_alters_phi_by_its_size(gate, support):
    """So that one learning rate serves coefficients of any size."""
    activation = Rational(gate=gate, support=support, **GATES[gate])
    activation.build(D_IN, D_SAE)
    a, b, *_ = (c.detach().double() for c in activation.coefficients())
    t = torch.linspace(-1 if support == "none" else 0, 1, 999).double()

    def r(a, b):
        P = torch.stack([c * t**i for i, c in enumerate(a)]).sum(0)
        return P / (1 + torch.stack([c * t ** (j + 1) for j, c in enumerate(b)]).sum(0).abs())

    step = 1e-6
    for i, unit in enumerate(activation.unit.double()):
        moved = torch.cat([a, b])
        moved[i] += step * unit
        change = r(moved[: len(a)], moved[len(a) :]) - r(a, b)
        assert change.norm().item() / step == pytest.approx(r(a, b).norm().item(), rel=0.01)


@SUPPORTS
@EVERY
def test_the_price(gate, support):
    sae, x = build(gate, support=support, l1_coef=0.3), torch.randn(N, D_IN).double()
    weights = Weights(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)
    codes, penalty = sae.activation.penalized(x, x, weights, 1.0)
    torch.testing.assert_close(penalty, 0.3 * reference(sae, x).abs().sum() / N)
    torch.testing.assert_close(codes.to_dense(), reference(sae, x))


@EVERY
def test_it_trains_without_a_teacher(tmp_path, gate):
    source = Synthetic(d_in=16, n_latents=32, active=3, noise=0.05)
    np.save(tmp_path / "x.npy", source.sample(4000).numpy())
    config = TrainConfig(
        out=tmp_path / "run",
        d_sae=64,
        activation=RationalConfig(gate=gate, k=4 if gate == "topk" else None),
        steps=100,
        batch_size=200,
        optimizer=Optimizer(lr=3e-3),
        device="cpu",
    )
    sae = Trainer(config, ActivationShards(tmp_path / "x.npy")).fit()
    assert sae.get_parameter("activation.change").abs().max() > 0
    exported = json.loads((config.out / "summary.json").read_text())["sae_lens"]
    assert exported.startswith("none: no other library's format supports rational")
    lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["fvu"] < 0.6 * lines[0]["fvu"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gate": "relu", "k": 3}, 'k = 3 has no effect with the gate "relu"'),
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"gate": "relu", "center": "zero"}, 'center "zero" is for .* got the gate "relu"'),
        ({"support": "none", "center": "zero"}, 'center "zero" is for .* with support "none"'),
        (
            {"degree": (0, 0)},
            r"degree must be two numbers from 0 to 64, not both 0, got \(0, 0\)",
        ),
        ({"l1_coef": -1.0}, "l1_coef must be at least 0, got -1.0"),
    ],
)
def test_nonsense_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Rational(**settings)


def test_a_fit_or_a_dictionary_that_does_not_match():
    with pytest.raises(ValueError, match="k must be between 1 and d_sae = 20, got 21"):
        SAE(D_IN, D_SAE, Rational(k=21))
    activation = Rational(k=3)
    activation.build(D_IN, D_SAE)
    fit = RationalFit(torch.zeros(2), torch.zeros(1), 1.0, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"the fit must have degree \(9, 8\), got \(1, 1\)"):
        activation.start_from_(fit)
