"""What a run keeps in memory and on disk is predicted to the byte."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastsae.checkpoint import save_checkpoint
from fastsae.distributed import Axes
from fastsae.estimate import Workload, disk_bytes, memory_of, state_bytes
from fastsae.nn import SAE, TopK
from fastsae.train.optim import Adam, Optimizer
from fastsae.train.plan import copies_of
from fastsae.train.standardization import Standardization
from fastsae.train.state import TrainState

SMALL = Workload(
    tokens=64,
    d_in=48,
    d_out=48,
    row_width=48,
    latents=320,
    active=4,
    steps=100,
    evaluated=64,
    checkpoints=2,
)


def state_of(w: Workload, device: str) -> TrainState:
    """What a run of this workload keeps, with the copies that it would have on a device."""
    sae = SAE(w.d_in, w.latents, TopK(w.active))
    settings = Optimizer(
        adam_moments="bf16" if w.low_moments else "fp32",
        adam_second="row" if w.row_second else "entry",
        adam_window=w.window,
        ema=0.9 if w.ema else None,
    )
    adam = Adam(sae, settings, **copies_of(w.precision))
    units = Standardization(torch.zeros(w.d_in), (1.0,), (1.0,), (w.d_in,))
    return TrainState.fresh(sae, adam, units)


CASES = [
    *itertools.product(("fp32", "int8"), (False,), (False, True), (1, 8), (False,)),
    *itertools.product(("bf16", "fp8"), (True,), (False, True), (8,), (False,)),
    ("fp32", False, False, 1, True),
]


@pytest.mark.parametrize("precision, gpu, low, window, ema", CASES)
def test_the_state_is_predicted_to_the_byte(precision, gpu, low, window, ema):
    settings = dict(precision=precision, gpu=gpu, low_moments=low, row_second=low, window=window)
    w = replace(SMALL, ema=ema, **settings)
    state = state_of(w, "cuda" if gpu else "cpu")
    adam = state.adam
    held = [*adam.parameters.values(), *adam.first.values(), *adam.second.values()]
    held += [*adam.average.values(), *adam.shadow.values(), *(adam.window or ())]
    if adam.quantized is not None:
        held += adam.quantized[:2]
    held += [state.tokens_since_fired]
    scalars = 4 * (w.window + w.d_in)
    assert 0 <= sum(t.nbytes for t in held) - sum(state_bytes(w).values()) <= scalars


def test_a_mesh_divides_what_grows_with_latents():
    whole, part = (sum(state_bytes(replace(SMALL, axes=Axes(1, n))).values()) for n in (1, 4))
    biases = 3 * 4 * SMALL.d_out  # with its moments, b_dec is whole on each process
    assert whole - biases == 4 * (part - biases)
    assert disk_bytes(replace(SMALL, axes=Axes(2, 1))) == disk_bytes(SMALL)


def test_a_checkpoint_takes_the_space_that_is_predicted(tmp_path: Path):
    state = state_of(SMALL, "cpu")
    folder = save_checkpoint(tmp_path, 1, state.tensors(), state.meta(), keep=1)
    size = sum(path.stat().st_size for path in folder.iterdir())
    (_, three), *_ = disk_bytes(SMALL).items()
    header = 5000 + 5056  # names and shapes; torch's random state
    assert 0 <= size - three / 3 < header


def test_pre_activations_of_an_encoder_in_fp32_take_twice_the_memory_on_a_gpu():
    low, tf32, fp32 = (
        memory_of(replace(SMALL, gpu=True, precision=precision)).step["pre-activations"]
        for precision in ("bf16", "tf32", "fp32")
    )
    assert 2 * low == tf32 == fp32 == 4 * SMALL.tokens * SMALL.latents


def test_the_peak_is_above_what_is_kept_and_grows_with_the_batch():
    memory, larger = (memory_of(replace(SMALL, tokens=n)) for n in (64, 4096))
    assert memory.kept == larger.kept < memory.peak < larger.peak
    assert sum(memory.parts.values()) == memory.peak


@pytest.mark.parametrize("gpu, axes, batches", [(False, 1, 2), (False, 4, 1.25), (True, 1, 1)])
def test_no_fitted_constant_is_in_the_lower_bound(gpu, axes, batches):
    w = replace(SMALL, gpu=gpu, axes=Axes(axes, 1))
    memory = memory_of(w)
    assert memory.certain == memory.kept + batches * 4 * w.tokens * w.row_width
    assert memory.certain <= memory.kept + memory.step["batches"] < memory.peak
