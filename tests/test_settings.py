"""Settings that make no sense, or would have no effect, are refused before anything runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxtyping
import pytest

from fastsae import SAE, AbsTopK, TopK
from fastsae.cli.help import command_help
from fastsae.cli.train import read_train
from fastsae.config import from_dict, to_dict
from fastsae.losses import Objective
from fastsae.nn import Activation, ActivationConfig, Init, TopKConfig
from fastsae.nn.activations import CHOICES
from fastsae.nn.batchtopk import BatchTopK, BatchTopKConfig
from fastsae.nn.gated import GatedConfig
from fastsae.nn.jumprelu import JumpReLU, JumpReLUConfig
from fastsae.nn.relu import ReLU, ReLUConfig
from fastsae.nn.variational import Variational, VariationalConfig
from fastsae.train import RECIPES, Optimizer, TrainConfig, recipe
from fastsae.train.plan import Plan

NAN, X, Y = float("nan"), Path("x.npy"), Path("y.npy")
ROTATED = TopKConfig(gradient="rotation")


@pytest.fixture
def no_types(monkeypatch):
    """As users call: without the tests' own check that arguments have the types they should."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


ACTIVATION = [
    (TopKConfig, {"k": 0}, "k must be at least 1, got 0"),
    (TopKConfig, {"by": "size"}, r"by must be one of \('value', 'abs'\), got 'size'"),
    (TopKConfig, {"gradient": "none"}, "gradient must be one of .*, got 'none'"),
    (TopKConfig, {"gradient": "rotation", "rotation": "full"}, "rotation must be one of .*'full'"),
    (TopKConfig, {"rotation": "dense"}, "rotation = dense has no effect without gradient"),
    (TopKConfig, {"corrections": -1}, "corrections must be at least 0, got -1"),
    (TopKConfig, {"corrections": 1, "gradient": "rotation"}, "corrections need gradient"),
    (BatchTopKConfig, {"k": -1}, "k must be at least 1, got -1"),
    (BatchTopKConfig, {"by": "norm"}, "by must be one of .*, got 'norm'"),
    (BatchTopKConfig, {"momentum": 1.0}, "momentum must be at least 0 and below 1, got 1.0"),
    (BatchTopKConfig, {"momentum": -0.1}, "momentum must be at least 0 and below 1, got -0.1"),
    (BatchTopKConfig, {"momentum": NAN}, "momentum must be at least 0 and below 1, got nan"),
    (JumpReLUConfig, {"threshold": -0.1}, "threshold must be at least 0, got -0.1"),
    (JumpReLUConfig, {"threshold": NAN}, "threshold must be at least 0, got nan"),
    (JumpReLUConfig, {"bandwidth": 0.0}, "bandwidth must be above 0, got 0.0"),
    (JumpReLUConfig, {"l0_coef": -1.0}, "l0_coef must be at least 0, got -1.0"),
    (JumpReLUConfig, {"target_l0": 0.0}, "target_l0 must be above 0, got 0.0"),
    (JumpReLUConfig, {"sparsity_warmup": 2.0}, "sparsity_warmup must be between 0 and 1, got 2.0"),
    (ReLUConfig, {"l1_coef": -0.5}, "l1_coef must be at least 0, got -0.5"),
    (ReLUConfig, {"l1_coef": 0.0, "target_l0": 8.0}, "target_l0 = 8.0 needs l1_coef above 0"),
    (ReLUConfig, {"l1_coef": NAN}, "l1_coef must be at least 0, got nan"),
    (ReLUConfig, {"target_l0": -3.0}, "target_l0 must be above 0, got -3.0"),
    (ReLUConfig, {"p_end": 0.0}, "p_end must be above 0 and at most 1, got 0.0"),
    (ReLUConfig, {"p_end": 1.5}, "p_end must be above 0 and at most 1, got 1.5"),
    (ReLUConfig, {"sparsity_warmup": -0.1}, "sparsity_warmup must be between 0 and 1, got -0.1"),
    (GatedConfig, {"l1_coef": -0.5}, "l1_coef must be at least 0, got -0.5"),
    (GatedConfig, {"target_l0": 0.0}, "target_l0 must be above 0, got 0.0"),
    (GatedConfig, {"sparsity_warmup": NAN}, "sparsity_warmup must be between 0 and 1, got nan"),
    (VariationalConfig, {"k": 0}, "k must be at least 1, got 0"),
    (VariationalConfig, {"variance": "all"}, "variance must be one of .*, got 'all'"),
    (VariationalConfig, {"variance": "fixed", "noise": "x"}, "noise must be one of .*, got 'x'"),
    (VariationalConfig, {"noise": "token"}, 'noise = token has no effect with variance "none"'),
    (VariationalConfig, {"beta": -0.1}, "beta must be at least 0, got -0.1"),
    (VariationalConfig, {"beta": NAN}, "beta must be at least 0, got nan"),
    (
        VariationalConfig,
        {"sparsity_warmup": 2.0},
        "sparsity_warmup must be between 0 and 1, got 2.0",
    ),
]


@pytest.mark.parametrize(("config", "settings", "message"), ACTIVATION, ids=str)
def test_an_activation(config, settings, message, no_types):
    """Also through the activation itself, where its arguments are checked the same."""
    with pytest.raises(ValueError, match=message):
        config(**settings)
    activation = config.activation
    with pytest.raises(ValueError, match=message):
        activation(**settings)


SETTINGS = [
    (Objective, {"error": "mse"}, r"error must be one of \('fvu', 'log_fvu', 'sse'\), got 'mse'"),
    (Objective, {"prefixes": (16, 8)}, r"prefixes must be above 0 and rise, got \(16, 8\)"),
    (Objective, {"prefixes": (-1, 8)}, r"prefixes must be above 0 and rise, got \(-1, 8\)"),
    (Objective, {"auxk_coef": NAN}, "auxk_coef must be at least 0, got nan"),
    (Objective, {"auxk_error": "sse"}, r"auxk_error must be one of \(.*\), got 'sse'"),
    (Objective, {"auxk_coef": 0.0, "auxk_error": "absolute"}, 'auxk_error "absolute" has no effe'),
    (Optimizer, {"lr": 0.0}, "lr must be above 0, got 0.0"),
    (Optimizer, {"eps": -1e-8}, "eps must be above 0, got -1e-08"),
    (Optimizer, {"clip": 0.0}, "clip must be above 0, got 0.0"),
    (Optimizer, {"warmup": -1}, "warmup must be at least 0, got -1"),
    (Optimizer, {"decay": 1.1}, "decay must be between 0 and 1, got 1.1"),
    (Optimizer, {"betas": (0.9, 1.0)}, r"betas must be at least 0 and below 1, got \(0.9, 1.0\)"),
    (Optimizer, {"ema": 1.0}, "ema must be between 0 and 1, got 1.0"),
    (Optimizer, {"ema": 0.0}, "ema must be between 0 and 1, got 0.0"),
    (Optimizer, {"constraint": "norm"}, "constraint must be one of .*, got 'norm'"),
    (Optimizer, {"adam_moments": "fp16"}, "adam_moments must be one of .*, got 'fp16'"),
    (Optimizer, {"adam_window": 9}, "adam_window must be between 1 and 8, got 9"),
    (Optimizer, {"adam_window": 2, "betas": (0.9, 0.0)}, "adam_window above 1 needs a second beta"),
    (Init, {"row_norm": 0.0}, "row_norm must be above 0, got 0.0"),
    (
        Init,
        {"rows": "active"},
        r"rows must be one of \('random', 'active_subspace'\), got 'active'",
    ),
    (Init, {"encoder": "free"}, "encoder must be one of .*, got 'free'"),
    (Init, {"b_dec": "0"}, "b_dec must be one of .*, got '0'"),
    (Init, {"encoder": "linear", "row_norm": 0.1}, 'encoder "linear" draws rows of its own'),
    (Init, {"encoder": "linear", "rows": "active_subspace"}, "draws rows of its own"),
    (TrainConfig, {"downstream": "mse"}, r"downstream must be one of \(.*\), got 'mse'"),
]


@pytest.mark.parametrize(("config", "settings", "message"), SETTINGS, ids=str)
def test_a_part_of_a_run(config, settings, message, no_types):
    with pytest.raises(ValueError, match=message):
        config(**settings)


def free(**settings: Any) -> Optimizer:
    return Optimizer(constraint="none", **settings)


RUNS: list[tuple[dict[str, Any], str]] = [
    ({"patience": 3}, "patience = 3 needs eval_every"),
    ({"skip": True}, "skip has no effect without a target"),
    ({"target": Y, "layers": (X,)}, "either a target .* or layers .*, got both"),
    ({"by_norm": True}, 'by_norm has no effect with constraint "unit"'),
    ({"by_norm": True, "layers": (Y,)}, "by_norm has no effect with layers"),
    ({"by_norm": True, "layers": (Y,), "optimizer": free()}, "by_norm has no effect with layers"),
    (
        {"target": Y, "optimizer": Optimizer(constraint="aligned")},
        'constraint "aligned" needs an autoencoder',
    ),
    ({"d_sae": 16}, "k must be between 1 and d_sae = 16, got 32"),
    ({"d_sae": 16, "activation": BatchTopKConfig()}, "k must be between 1 and d_sae = 16, got 32"),
    ({"d_sae": 16, "activation": VariationalConfig()}, "k must be between 1 and d_sae = 16, got"),
    (
        {"d_sae": 64, "objective": Objective(prefixes=(8, 65))},
        "must be at most d_sae = 64",
    ),
    ({"d_sae": 127, "objective": Objective(multi_k=True)}, "4 k latents, .* and d_sae = 127"),
    *(
        ({"activation": activation, "objective": Objective(multi_k=True)}, "multi_k needs topk")
        for activation in (BatchTopKConfig(), JumpReLUConfig(), ReLUConfig(), ROTATED)
    ),
    (
        {
            "activation": TopKConfig(gradient="rotation", rotation="dense"),
            "objective": Objective(prefixes=(8,)),
        },
        'rotation="dense" cannot be combined with prefixes',
    ),
    ({"steps": 0}, "steps must be at least 1, got 0"),
    ({"batch_size": 1}, "batch_size must be at least 2, got 1"),
    ({"d_sae": 0}, "d_sae must be at least 1, got 0"),
    ({"dead_after": 0}, "dead_after must be at least 1, got 0"),
    ({"downstream": "kl", "downstream_coef": -1.0}, "downstream_coef must be at least 0, got -1.0"),
    ({"downstream": "kl", "downstream_windows": 0}, "downstream_windows must be at least 1, got 0"),
    ({"downstream": "kl", "data": X}, 'downstream "kl" needs a model to run, got data: x.npy'),
    ({"downstream": "kl", "target": Y}, 'downstream "kl" needs an autoencoder, got a target'),
    ({"downstream": "ce", "layers": (Y,)}, 'downstream "ce" needs an autoencoder, got layers'),
    ({"activation": TopKConfig(corrections=1), "target": Y}, "needs an autoencoder, got a trans"),
    ({"activation": TopKConfig(corrections=1), "layers": (Y,)}, "needs an autoencoder, got a cros"),
    ({"downstream_coef": 2.0}, 'downstream_coef = 2.0 has no effect with downstream "none"'),
    ({"downstream_windows": 4}, 'downstream_windows = 4 has no effect with downstream "none"'),
]

UNFUSED: list[tuple[dict[str, Any], str]] = [
    ({"target": Y}, "a transcoder"),
    ({"layers": (Y,)}, "a crosscoder"),
    ({"by_norm": True, "optimizer": free()}, "by_norm"),
    ({"activation": ROTATED}, 'gradient "rotation"'),
    *(
        ({"activation": CHOICES[name]}, f'activation "{name}"')
        for name in ("jumprelu", "relu", "gated", "variational")
    ),
    ({"objective": Objective(prefixes=(8,))}, "prefixes or multi_k"),
    ({"objective": Objective(multi_k=True)}, "prefixes or multi_k"),
    ({"optimizer": free()}, 'constraint "none"'),
    ({"optimizer": Optimizer(constraint="aligned")}, 'constraint "aligned"'),
    ({"downstream": "kl"}, "downstream"),
    ({"optimizer": Optimizer(clip=1.0)}, "clip"),
]
FUSED_ONLY: dict[str, Any] = {
    "encoder_precision": "bf16",
    "adam_moments": "bf16",
    "adam_window": 2,
}


@pytest.mark.parametrize(("settings", "message"), RUNS, ids=str)
def test_a_run(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


@pytest.mark.parametrize(("settings", "reason"), UNFUSED, ids=str)
def test_what_the_fused_step_does_not_serve(settings, reason):
    """It goes through autograd by itself, and not at all with what only the fused step has."""
    assert TrainConfig(**settings).needs_autograd == reason
    with pytest.raises(ValueError, match=f'{reason} needs the autograd step, got step "fused"'):
        TrainConfig(**settings, step="fused")
    with pytest.raises(ValueError, match=f'"bf16" needs the fused step, got {reason}'):
        TrainConfig(**settings, encoder_precision="bf16")


@pytest.mark.parametrize(("name", "value"), FUSED_ONLY.items())
def test_what_the_autograd_step_does_not_have(name, value):
    settings: dict[str, Any] = {name: value}
    if name != "encoder_precision":
        settings = {"optimizer": Optimizer(**settings)}
    assert TrainConfig(**settings, step="fused").needs_autograd is None
    with pytest.raises(ValueError, match=f"{name} .*needs the fused step"):
        TrainConfig(**settings, step="autograd")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"activation": CHOICES["batchtopk"]}, 'activation "batchtopk"'),
        ({"step": "autograd"}, 'step "autograd"'),
        ({"optimizer": Optimizer(clip=1.0)}, "clip"),
    ],
    ids=str,
)
def test_what_cannot_be_a_cuda_graph(settings, reason):
    """It is no graph by itself, and an error where one is asked for."""
    assert TrainConfig(**settings).not_captured == reason
    with pytest.raises(ValueError, match=f'{reason} cannot be captured, got cuda_graph "on"'):
        TrainConfig(**settings, cuda_graph="on")


def test_a_cpu_has_no_cuda_graph():
    config = TrainConfig(device="cpu", cuda_graph="on")
    with pytest.raises(ValueError, match='cuda_graph "on" needs a GPU, got device cpu'):
        Plan.of(config, 64, 1000)


@pytest.mark.parametrize("name", ["topk", "abstopk", "batchtopk", "batchabstopk"])
def test_the_fused_step_serves_plain_selections(name):
    assert TrainConfig(activation=CHOICES[name], step="fused").needs_autograd is None


@pytest.mark.parametrize(
    "name", [name for name, config in CHOICES.items() if config.name != "topk"]
)
def test_a_setting_of_another_activation_is_named(name):
    cfg = CHOICES[name]
    assert from_dict(ActivationConfig, to_dict(cfg), "activation") == cfg
    with pytest.raises(ValueError, match=f"{cfg.name} has no setting 'gradient'; its settings are"):
        from_dict(ActivationConfig, {**to_dict(cfg), "gradient": "rotation"}, "activation")
    with pytest.raises(TypeError, match="gradient"):
        cfg.activation(gradient="rotation")


def test_older_files_say_0_where_no_coefficient_was_given():
    saved = {**to_dict(ReLUConfig(target_l0=8.0)), "l1_coef": 0.0}
    assert from_dict(ActivationConfig, saved) == ReLUConfig(target_l0=8.0)


@pytest.mark.parametrize("settings", [{}, *(settings for settings, _ in UNFUSED)], ids=str)
def test_a_run_and_its_json_are_one(settings):
    config = TrainConfig(**settings)
    assert from_dict(TrainConfig, to_dict(config)) == config


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_run(name):
    config = recipe(name, 512)
    assert from_dict(TrainConfig, to_dict(config)) == config
    assert config.d_sae == 512


def test_an_unknown_recipe():
    with pytest.raises(ValueError, match="recipe must be one of openai, .*, got 'anthropic'"):
        recipe("anthropic")


BUILDS: list[tuple[Callable[[], Any], str]] = [
    (lambda: SAE(8, 16, BatchTopK(17)), "k must be between 1 and d_sae = 16, got 17"),
    (lambda: SAE(8, 16, Variational(17)), "k must be between 1 and d_sae = 16, got 17"),
    (lambda: SAE(8, 16, AbsTopK(17)), "k must be between 1 and d_sae = 16, got 17"),
    (lambda: SAE(8, 16, TopK(2), skip=True), "skip needs d_out"),
    (lambda: SAE(8, 16, TopK(2), d_out=0), "d_out must be at least 1, got 0"),
    (lambda: SAE(8, 2**62, TopK(2)), "d_sae must be at most 268435456, got 4611686018427387904"),
    (lambda: SAE(8, 16, TopK(2), layers=0), "layers must be at least 1, got 0"),
    (lambda: SAE(8, 16, TopK(2), layers=3), "layers must divide d_in = 8 and d_out be None, got 3"),
    (lambda: SAE(8, 16, TopK(2), 8, layers=2), "layers must divide .* got 2 and 8"),
]


@pytest.mark.parametrize(("build", "message"), BUILDS)
def test_an_sae(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("activation", [JumpReLU(), ReLU(), BatchTopK(2)])
def test_an_objective_for_another_sae(activation: Activation):
    sae = SAE(8, 16, activation)
    with pytest.raises(ValueError, match="multi_k needs topk without rotation"):
        Objective(multi_k=True).check(sae)
    with pytest.raises(ValueError, match="prefixes must be at most d_sae = 16"):
        Objective(prefixes=(4, 17)).check(sae)
    with pytest.raises(ValueError, match=r"prefixes \(16,\) have no effect"):
        Objective(prefixes=(16,)).check(sae)
    Objective(prefixes=(4, 16)).check(sae)


@pytest.mark.parametrize("name", CHOICES)
def test_the_command_line_knows_every_setting(name):
    """By names that no two parts of a config share."""
    shown = command_help("train", ["--activation", name])
    assert all(f"--{field.replace('_', '-')}" in shown for field in vars(CHOICES[name]))
    assert read_train(["--activation", name]).config.activation == CHOICES[name]
