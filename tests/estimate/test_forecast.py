"""Forecasts say what fits, what would fit instead, and which part of a step takes longest."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastsae.distributed import Axes
from fastsae.estimate import (
    GPUS,
    Machine,
    Workload,
    advice,
    cpu_step,
    cpu_step_seconds,
    duration,
    forecast,
    gigabytes,
    gpu_like,
    gpu_named,
    refusal,
)
from fastsae.estimate.forecast import smaller

D = Workload(
    tokens=4096,
    d_in=4096,
    d_out=4096,
    row_width=4096,
    latents=1 << 20,
    active=128,
    steps=1000,
    evaluated=1024,
    gpu=True,
    precision="fp8",
)


CPU = replace(D, gpu=False, precision="fp32", tokens=64, d_in=64, d_out=64, latents=256, active=8)


def on(name: str, workload: Workload = D):
    return forecast(workload, Machine.of_gpu(gpu_named(name), workload.axes.size))


def test_a_million_latents_fit_an_h200_but_no_card_of_24_gb():
    assert on("h200").fits
    small = on("rtx4090")
    assert small.cannot_fit and not small.fits
    text = refusal(small)
    assert text.startswith("does not fit") and "--mesh data=1,latent=8" in text and "H200" in text


def test_what_is_said_to_fit_fits():
    small = on("l4")
    changes = {change.split(" (")[0]: workload for change, workload in smaller(small)}
    said = refusal(small).partition("what would fit: ")[2].split("; ")
    found = [text.split(" (")[0] for text in said if text.startswith("--")]
    assert found
    for text in found:
        assert forecast(changes[text], small.machine).fits, text
    assert not forecast(changes["--adam-moments bf16"], small.machine).fits
    assert not any(text.startswith("--adam") for text in found)


def test_moments_are_the_remedy_where_they_are_enough():
    weights = on("h200").memory.state
    room = sum(weights.values()) - weights["Adam's moments"] // 4
    tight = forecast(D, Machine(title="a GPU", memory=room + 6e9))
    assert not tight.fits
    assert advice(tight).startswith("--adam-moments bf16 (needs ")


def test_what_is_certain_is_told_from_what_is_estimated():
    w = replace(D, tokens=1024, latents=1 << 16)
    memory = on("h200", w).memory
    certain = memory.kept + memory.step["batches"]
    sure, unsure = (
        refusal(forecast(w, Machine(title="a GPU", memory=room)))
        for room in (certain - 1, memory.peak - 1)
    )
    assert f"weights, optimizer and batches need at least {gigabytes(certain)} of" in sure
    assert f"it needs about {gigabytes(memory.peak)} of" in unsure
    autograd = forecast(replace(w, fused=False), Machine(title="a GPU", memory=1e9))
    assert "is a lower bound" in refusal(autograd)


def test_only_low_precisions_are_predicted_on_a_gpu():
    assert on("h100", replace(D, precision="bf16")).step_seconds
    assert on("h100", replace(D, precision="fp32")).step_seconds is None
    assert on("h100", replace(D, precision="tf32")).step_seconds is None


def test_advice_is_what_the_run_does_not_do_yet():
    assert advice(on("h200")).startswith("--adam-moments bf16 and --adam-window 8 read")
    assert advice(on("h200", replace(D, low_moments=True))).startswith("--adam-window 8 reads")
    done = forecast(replace(D, low_moments=True, window=8), on("h200").machine, {"optimizer": 1.0})
    assert advice(done) == "a larger --batch-size updates less often"
    odd = replace(D, tokens=4095, axes=Axes(3, 1))
    assert not any("--mesh" in change for change, _ in smaller(on("l4", odd)))


def test_a_mesh_needs_less_memory_and_more_network():
    alone, together = on("h200"), on("h200", replace(D, axes=Axes(1, 8)))
    assert together.memory.kept < alone.memory.kept / 7
    assert "network" in (together.seconds or {}) and "network" not in (alone.seconds or {})
    assert together.step_seconds is not None and alone.step_seconds is not None
    assert alone.step_seconds / 8 < together.step_seconds < alone.step_seconds
    assert together.machine.price == pytest.approx(8 * GPUS["h200"].price)


def test_the_part_that_takes_longest_limits():
    assert on("h200").limit == "optimizer"
    assert on("h200", replace(D, low_moments=True, window=8)).limit == "encoder GEMM"
    few = replace(D, tokens=256, latents=1 << 18, precision="bf16")
    assert on("a100-80", few).limit == "optimizer"
    lazy = on("a100-80", replace(few, low_moments=True, window=8))
    assert (lazy.step_seconds or 0) < (on("a100-80", few).step_seconds or 0)


def test_faster_gpus_are_faster():
    seconds = [on(name, replace(D, precision="bf16")).step_seconds or 0 for name in GPUS]
    assert all(gpu.source and gpu.price > 0 for gpu in GPUS.values())
    assert on("h100").step_seconds and seconds[0] == min(seconds)
    assert seconds[[*GPUS].index("l4")] > seconds[[*GPUS].index("h100")]


@pytest.mark.parametrize(
    "device, name",
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA L40S", "l40s"),
        ("Some other", None),
    ],
)
def test_a_device_is_found_by_its_name(device, name):
    assert gpu_like(device) is (name and GPUS[name])


def test_an_unknown_gpu_is_an_error():
    with pytest.raises(ValueError, match="gpu must be one of b200, h200, .* got 'voodoo'"):
        gpu_named("voodoo")


def test_every_part_of_a_cpu_step_is_timed():
    seconds = cpu_step_seconds(CPU)
    assert seconds.keys() == {"encoder", "decode", "optimizer", "data and counters"}
    assert all(0 < value < 60 for value in seconds.values())


class StoragesUsed(TorchDispatchMode):
    """Notes the storages of all tensors that operations get."""

    def __init__(self):
        super().__init__()
        self.found: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in given if isinstance(leaf, torch.Tensor)]
        self.found |= {tensor.untyped_storage().data_ptr() for tensor in tensors}
        return func(*args, **(kwargs or {}))


def test_no_part_is_timed_on_what_was_read_into_the_caches_before(monkeypatch):
    sizes = []

    def noted(run, read_before=None):
        with StoragesUsed() as used:
            run()
        assert used.found
        if read_before is not None:
            assert read_before.untyped_storage().data_ptr() not in used.found
            sizes.append(read_before.numel())
        return 1.0

    monkeypatch.setattr(cpu_step, "timed", noted)
    cpu_step_seconds(CPU)
    # before all but the encoder: weights with two moments, and four batches
    assert sizes == 3 * [3 * CPU.entries + 4 * CPU.tokens * CPU.row_width]


def test_sizes_are_readable():
    assert [duration(s) for s in (7.5, 90.0, 7200.0)] == ["7.5 seconds", "1.5 minutes", "2.0 hours"]
    assert [gigabytes(size) for size in (1.5e12, 24e9, 307e6, 9000)] == [
        "1.5 TB",
        "24 GB",
        "307 MB",
        "9 kB",
    ]
