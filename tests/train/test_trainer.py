"""Whole small runs: they learn, they can be resumed exactly, and they stop when they should."""

import dataclasses
import json
import shutil
import sys

import numpy as np
import pytest
import torch

import fastsae
from fastsae.checkpoint import list_checkpoints
from fastsae.data import ActivationShards, Joined, Synthetic
from fastsae.files import read_tensors
from fastsae.memory import available_memory
from fastsae.train import Trainer
from fastsae.train.curves import PANELS, plot_curves
from fastsae.train.log import read_lines
from fastsae.train.plan import Plan
from fastsae_kernels.adam import WIDEST

from .conftest import Stop, StoppingShards, train_config

pytestmark = pytest.mark.usefixtures("undrawn")
SMALL = {"d_sae": 64, "k": 4, "batch_size": 200, "lr": 3e-3, "log_every": 5}
REVIVING = {"d_sae": 512, "dead_after": 400}  # enough latents that some are dead and aux-k runs


@pytest.fixture
def config(tmp_path, activations):
    def build(**settings):
        settings = {"data": activations, "out": tmp_path / "run", "steps": 40, **SMALL, **settings}
        return train_config(**{**settings, **{n: str(settings[n]) for n in ("data", "out")}})

    return build


@pytest.mark.parametrize("precision", ["tf32", "fp8"])
def test_what_needs_a_gpu(config, precision):
    run = config(encoder_precision=precision, device="cpu")
    with pytest.raises(ValueError, match=f"{precision} needs a GPU: this CPU knows fp32"):
        fit(run)
    assert not run.out.exists()


@pytest.mark.parametrize(
    ("precision", "instructions", "message"),
    [
        ("bf16", {"avx512_vnni"}, "bf16 needs .* bfloat16 instructions: this CPU knows fp32, int8"),
        ("int8", {"avx512_bf16"}, "int8 needs .* VNNI instructions: this CPU knows fp32, bf16"),
    ],
)
def test_what_a_processor_lacks(config, precision, instructions, message, monkeypatch):
    for module in ("product", "int8"):
        monkeypatch.setattr(f"fastsae_kernels.{module}.instructions", lambda: instructions)
    with pytest.raises(ValueError, match=message):
        fit(config(encoder_precision=precision, device="cpu"))


TOPK = {"activation": "topk", "k": 2, "d_sae": 4096}


@pytest.mark.parametrize(
    ("settings", "capability", "d_in", "expected"),
    [
        (TOPK, (9, 0), 64, "fp8"),
        (TOPK, (8, 9), 64, "fp8"),
        (TOPK, (8, 0), 64, "bf16"),
        (TOPK, (9, 0), 65, "bf16"),
        (TOPK | {"d_sae": 4104}, (9, 0), 64, "bf16"),
        (TOPK | {"k": 3}, (9, 0), 64, "bf16"),
        (TOPK | {"activation": "abstopk"}, (9, 0), 64, "fp8"),
        (TOPK | {"activation": "batchtopk"}, (9, 0), 64, "bf16"),
        (TOPK | {"step": "autograd"}, (9, 0), 64, "fp32"),
        (TOPK | {"k": 3, "encoder_precision": "fp8"}, (9, 0), 64, "fp8"),
        (TOPK | {"encoder_precision": "bf16"}, (9, 0), 64, "bf16"),
    ],
)
def test_precision_on_a_gpu(config, settings, capability, d_in, expected, monkeypatch):
    """fp8 where the card and the sizes allow it and it is worth it, or where it is asked for."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    assert Plan.of(config(**settings), d_in, 1000).encoder_precision == expected


@pytest.mark.parametrize(
    ("settings", "capability", "d_in", "message"),
    [
        (TOPK, (8, 6), 64, "has 8.6: take bf16, tf32 or fp32"),
        (TOPK, (9, 0), 65, "d_in and d_sae to be multiples of 16, got 65 and 4096: take bf16"),
        (TOPK | {"d_sae": 4100}, (9, 0), 64, "multiples of 16, got 64 and 4100: take bf16"),
        (TOPK | {"activation": "batchtopk"}, (9, 0), 64, "is for topk, got batchtopk: take bf16"),
    ],
)
def test_fp8_is_refused_where_a_gpu_cannot(
    config, settings, capability, d_in, message, monkeypatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    with pytest.raises(ValueError, match=message):
        Plan.of(config(**settings, encoder_precision="fp8"), d_in, 1000)


def test_no_graph_of_rows_that_the_kernel_cannot_hold(config, monkeypatch):
    """Adam's torch path looks at values, which a recording forbids."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    demanded = config(cuda_graph="on", device="cuda")
    Plan.of(demanded, WIDEST, 1000)
    with pytest.raises(ValueError, match=f"a width of at most {WIDEST}, got {WIDEST + 1}"):
        Plan.of(demanded, WIDEST + 1, 1000)
    run = config(device="cpu")
    trainer = Trainer(run, ActivationShards(run.data))
    trainer.device = torch.device("cuda")
    assert trainer.captures
    monkeypatch.setattr("fastsae.train.trainer.WIDEST", trainer.columns.width_out - 1)
    assert not trainer.captures


@pytest.mark.parametrize("target", [False, True])
def test_a_batch_that_memory_cannot_hold_is_refused_before_the_run_begins(
    target, config, tmp_path, monkeypatch
):
    """A transcoder's batch has its inputs and its targets."""
    run = config(batch_size=2**20, target=str(tmp_path) if target else None)
    data = ActivationShards(run.data)
    if target:
        data = Joined(data, Synthetic(d_in=3, n_latents=8, active=2, n_tokens=data.n_tokens))
    size = 4 * 2**20 * data.d_in
    monkeypatch.setattr("fastsae.train.plan.available_memory", lambda: size)
    Trainer(run, data)
    monkeypatch.setattr("fastsae.train.plan.available_memory", lambda: size - 1)
    with pytest.raises(ValueError, match=f"at most {2**20 - 1}, .* width {data.d_in}, got {2**20}"):
        Trainer(run, data)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, 3 * 2**20),
        ({"job/memory.max": 2**20, "job/task/memory.max": "max"}, 2**20),
        ({"memory.max": 2**21, "job/memory.max": 2**40}, 2**21),
        ({"memory/memory.limit_in_bytes": 2**20}, 2**20),
    ],
)
def test_the_smallest_limit_is_the_memory_that_is_available(limits, expected, tmp_path):
    files = {f"sys/fs/cgroup/{name}": limit for name, limit in limits.items()}
    files["proc/meminfo"] = f"MemTotal: 9999 kB\nMemAvailable:    {3 * 2**10} kB\n"
    files["proc/self/cgroup"] = "9:name=systemd:/\n0::/job/task\n"
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    assert available_memory(tmp_path) == expected
    assert available_memory(tmp_path / "none") == sys.maxsize
    assert (available_memory() < sys.maxsize) == sys.platform.startswith("linux")


@pytest.mark.parametrize(
    "damage",
    [
        *({"step": 1.5}, {"step": True}, {"step": float("nan")}, {"step": 2**64}),
        *({"fvu": True}, {"fvu": float("nan")}, {"l0": float("inf")}, {"l0": None}),
    ],
    ids=str,
)
def test_metrics_are_read_up_to_a_damaged_line(damage, tmp_path):
    path, sound = tmp_path / "metrics.jsonl", {"step": 5, **dict.fromkeys(PANELS, 0.5), "loss": 2}
    path.write_text("\n".join(map(json.dumps, [sound, sound, sound | damage, sound])))
    assert read_lines(path) == [sound, sound]


def fit(config, resume=False):
    return Trainer(config, ActivationShards(config.data)).fit(resume)


@pytest.mark.parametrize(("activation", "step"), [("topk", "fused"), ("abstopk", "autograd")])
def test_a_run_leaves_what_it_promises(config, activation, step):
    config = config(activation=activation, step=step, steps=200)
    sae = fit(config)
    summary = json.loads((config.out / "summary.json").read_text())
    lines = read_lines(config.out / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(5, 201, 5))
    assert summary["fvu"] < 0.3 < lines[0]["fvu"]
    assert summary["tokens"] == 200 * 200
    assert summary["step_path"] == step
    assert {"l0", "dead_fraction", "tokens_per_second", "seconds"} <= summary.keys()
    again = fastsae.load(config.out / "sae")
    x = torch.from_numpy(np.load(config.data)[:50])
    assert torch.equal(again(x), sae(x))
    error = (x - again(x)).square().sum() / (x - x.mean(0)).square().sum()
    assert error < 0.5, "the saved SAE must take activations as they are"


def test_a_run_leaves_a_plot(config, monkeypatch):
    monkeypatch.setattr("fastsae.train.results.plot_curves", plot_curves)
    run = config()
    fit(run)
    assert (run.out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_both_ways_give_the_same_curve(config, tmp_path):
    curves = []
    for step in ("fused", "autograd"):
        run = config(step=step, out=tmp_path / step, **REVIVING)
        fit(run)
        lines = read_lines(run.out / "metrics.jsonl")
        assert any(line["auxk"] > 0 for line in lines), "some latents must die, to be revived"
        curves.append([line["loss"] for line in lines])
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-4)


def test_a_planted_dictionary_is_recovered(tmp_path):
    source = Synthetic(d_in=32, n_latents=48, active=2, n_tokens=20_000, noise=0.0, seed=3)
    config = train_config(
        out=str(tmp_path / "run"),
        d_sae=96,
        k=2,
        steps=500,
        batch_size=512,
        lr=3e-3,
        dead_after=20_000,
    )
    sae = Trainer(config, source).fit()
    assert source.recovery(sae.W_dec.detach()) > 0.9


@pytest.mark.parametrize(("activation", "rotation"), [("topk", "support"), ("abstopk", "dense")])
def test_the_rotation_gradient_trains(config, activation, rotation):
    """Through autograd, and saved with the SAE."""
    run = config(activation=activation, gradient="rotation", rotation=rotation, steps=100)
    sae = fit(run)
    lines = read_lines(run.out / "metrics.jsonl")
    assert lines[-1]["fvu"] < 0.7 * lines[0]["fvu"]
    assert json.loads((run.out / "summary.json").read_text())["step_path"] == "autograd"
    assert fastsae.load(run.out / "sae").activation.cfg == sae.activation.cfg
    assert sae.activation.cfg.rotation == rotation


OPTIONS = [
    {},
    {"adam_moments": "bf16", "adam_window": 4, "adam_second": "row"},
    {"encoder_precision": "int8", "adam_moments": "bf16", "adam_window": 4},
]


@pytest.fixture
def every_instruction(monkeypatch):
    """What a processor lacks is emulated; int8 always, as oneDNN is slow at widths below 32."""
    monkeypatch.setattr("fastsae_kernels.int8.why_not_int8", lambda device: "emulated")
    monkeypatch.setattr("fastsae_kernels.proof.CPU_BF16", "1")
    monkeypatch.setattr("fastsae.train.plan.why_not_int8", lambda device: None)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_same_seed_gives_the_same_bits(config, tmp_path, options, every_instruction):
    files = []
    for name in ("one", "two"):
        run = config(out=tmp_path / name, **options, **REVIVING)
        fit(run)
        files.append((run.out / "sae" / "sae.safetensors").read_bytes())
        lines = read_lines(run.out / "metrics.jsonl")
        recalls = [line["candidate_recall"] for line in lines if "candidate_recall" in line]
        assert len(recalls) == len(lines) * ("encoder_precision" in options)
        assert all(0 < recall <= 1 for recall in recalls)
    assert files[0] == files[1]
    other = config(out=tmp_path / "other", **options, **REVIVING, seed=1)
    fit(other)
    assert (other.out / "sae" / "sae.safetensors").read_bytes() != files[0]


FLOAT8 = {"encoder_precision": "fp8"}  # emulated: the plan of a run on a CPU refuses it


@pytest.mark.parametrize(
    ("stops", "options", "planned"),
    [
        ([1], {}, {}),
        ([23, 1, 1], {}, {}),
        ([7, 20], OPTIONS[1], {}),
        ([5, 3], OPTIONS[1], FLOAT8),
        ([9, 2], OPTIONS[2], {}),
    ],
)
def test_resuming_changes_no_bit(
    config, tmp_path, stops, options, planned, monkeypatch, every_instruction
):
    """The dead are found again every other step, also between a checkpoint and its resumption."""
    plan, planned = Plan.of, {"dead_every": 2, **planned}
    monkeypatch.setattr(
        Plan, "of", lambda *arguments: dataclasses.replace(plan(*arguments), **planned)
    )
    settings = {"checkpoint_every": 3, **REVIVING, **options}
    whole = config(out=tmp_path / "whole", **settings)
    fit(whole)
    broken = config(out=tmp_path / "broken", **settings)
    for number, batches in enumerate(stops):
        with pytest.raises(Stop):
            Trainer(broken, StoppingShards(broken.data, batches)).fit(resume=number > 0)
    fit(broken, resume=True)
    for name in ("sae/sae.safetensors", "sae/config.json"):
        assert (broken.out / name).read_bytes() == (whole.out / name).read_bytes()
    timing = ("seconds", "tokens_per_second")
    curves = [
        [{k: v for k, v in line.items() if k not in timing} for line in read_lines(out)]
        for out in (whole.out / "metrics.jsonl", broken.out / "metrics.jsonl")
    ]
    assert curves[0] == curves[1]


def test_only_the_last_checkpoints_are_kept(config):
    run = config(checkpoint_every=10, keep_checkpoints=2)
    fit(run)
    names = [path.name for path in list_checkpoints(run.out / "checkpoints")]
    assert names == ["step-00000030", "step-00000040"]


def test_a_damaged_checkpoint_is_passed_over(config, capsys):
    run = config(checkpoint_every=10)
    fit(run)
    saved = (run.out / "sae" / "sae.safetensors").read_bytes()
    older, newest = list_checkpoints(run.out / "checkpoints")
    for damaged in (newest, older):
        path = damaged / "state.safetensors"
        content = bytearray(path.read_bytes())
        content[-9] ^= 1
        path.write_bytes(content)
        if damaged == newest:
            fit(run, resume=True)
            said = capsys.readouterr().err
            assert "step-00000040 was changed after it was written" in said
            assert "resumed at step 30" in said
            assert (run.out / "sae" / "sae.safetensors").read_bytes() == saved
    shutil.rmtree(newest)
    with pytest.raises(ValueError, match="no checkpoint is intact: .*step-00000030 was changed"):
        fit(run, resume=True)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, r"step \d+: data holds NaN or Inf: bad.npy row 1234"),
        (1e30, r"NaN or Inf at step \d+.* in bad.npy row 1234;"),  # finite, but its square is not
    ],
)
def test_a_bad_value_is_reported_with_step_file_and_row(
    value, message, config, tmp_path, activations, monkeypatch
):
    for module in ("trainer", "columns"):
        monkeypatch.setattr(f"fastsae.train.{module}.SAMPLE_TOKENS", 10)
    x = np.load(activations)
    x[1234, 5] = value
    np.save(tmp_path / "bad.npy", x)
    run = config(checkpoint_every=1, max_norm_ratio=None)
    with pytest.raises(ValueError, match=message):
        Trainer(run, ActivationShards(tmp_path / "bad.npy")).fit()
    assert_finite(list_checkpoints(run.out / "checkpoints")[-1])


def assert_finite(checkpoint):
    tensors = read_tensors(checkpoint / "state.safetensors")
    del tensors["limits"]  # infinite if no token is left out
    assert all(tensor.isfinite().all() for tensor in tensors.values())


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_data_without_variance_is_refused(config, tmp_path, value):
    """And the folder is left free for another try."""
    np.save(tmp_path / "flat.npy", np.full((500, 16), value, "f4"))
    run = config(data=tmp_path / "flat.npy")
    with pytest.raises(ValueError, match="activations (must|are)"):
        fit(run)
    assert [path.name for path in run.out.iterdir()] == [".lock"]


def test_a_loss_that_overflows_stops_the_run(config):
    run = config(lr=1e30, warmup=0, checkpoint_every=1)
    with pytest.raises(ValueError, match=r"NaN or Inf at step \d+.* in activations.npy row \d+"):
        fit(run)
    assert_finite(list_checkpoints(run.out / "checkpoints")[-1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"k": 65}, "k must be between 1 and d_sae = 64, got 65"),
        ({"batch_size": 1}, "batch_size must be at least 2"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be above 0, got 0.0"),
        ({"decay": 1.5}, "decay must be between 0 and 1, got 1.5"),
        ({"auxk_coef": 0.0, "k_aux": 8}, "k_aux = 8 has no effect with auxk_coef = 0"),
        ({"encoder_precision": "bf16", "step": "autograd"}, "needs the fused step"),
        ({"encoder_precision": "fp8", "step": "autograd"}, "needs the fused step"),
        ({"adam_moments": "bf16", "step": "autograd"}, 'adam_moments "bf16" needs the fused step'),
        ({"adam_window": 2, "gradient": "rotation"}, "adam_window = 2 needs the fused step"),
        ({"adam_window": 9}, "adam_window must be between 1 and 8, got 9"),
        ({"rotation": "dense"}, "rotation = dense has no effect"),
        ({"gradient": "rotation", "step": "fused"}, "needs the autograd step"),
    ],
)
def test_nonsense_settings_are_refused(config, settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)
