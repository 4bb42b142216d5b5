"""Each architecture's loss over 100 steps, against the one that is stored.

The runs are in float64. A machine that adds up in another order is off by a rounding of a few
parts in 2^52 at every step, and the choice of the active latents makes no difference larger unless
two of them are that close. `record` finds out what is left of one such rounding of every weight,
made before the first step, and refuses a curve that 100 of them would move by RTOL.

    python -m tests.test_curves [NAME ...]      stores curves again, all or those named
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastsae.train.optim import Optimizer

from .architectures import ARCHITECTURES
from .curves.training import evaluated, small_steps, train

STORED = Path(__file__).parent / "curves" / "losses.json"
STEPS, EVERY, LR, RTOL = 100, 10, 5e-3, 1e-9


def curve(name: str, off_by: float = 0.0) -> tuple[list[float], float, float]:
    """Losses of every tenth step and of the last, and what FVU was and is in evaluation.

    Weights start off by that part of them.
    """
    torch.manual_seed(0)
    architecture = ARCHITECTURES[name]
    torch.set_default_dtype(torch.float64)  # in float32, randn depends on the processor
    try:
        sae = architecture.build()
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for parameter in sae.parameters():
            signs = torch.randint(2, parameter.shape).double() * 2 - 1
            parameter.mul_(1 + off_by * signs)
    norms = "none" if sae.by_norm else "unit"
    before = evaluated(sae)
    results = train(sae, architecture.objective, Optimizer(constraint=norms), STEPS, LR)
    losses = [float(result.loss) for result in (*results[::EVERY], results[-1])]
    return losses, before, evaluated(sae)


@pytest.fixture(autouse=True)
def fast() -> Iterator[None]:
    with small_steps():
        yield


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_curve_is_as_stored(name):
    losses, before, after = curve(name)
    stored = torch.tensor(json.loads(STORED.read_text())[name], dtype=torch.float64)
    torch.testing.assert_close(stored.new_tensor(losses), stored, rtol=RTOL, atol=0)
    slow = {"vsae": 1.0, "rational": 0.45, "matryoshka, rational": 0.45}
    slow |= {"vsae with noise in units of tokens": 0.9, "vsae of learned variance": 0.4}
    least = slow.get(name, 1 / 3)  # the noise of a vsae is as large as these data
    assert after < least * before, "and it must be one of learning"


def test_only_what_there_is_is_stored():
    assert json.loads(STORED.read_text()).keys() == ARCHITECTURES.keys()


def record(names: list[str]) -> None:
    stored = json.loads(STORED.read_text()) if STORED.exists() else {}
    for name in names or ARCHITECTURES:
        losses, before, after = curve(name)
        moved, *_ = curve(name, torch.finfo(torch.float64).eps)
        stored[name] = losses
        sensitivity = max(abs(a / b - 1) for a, b in zip(moved, losses, strict=True))
        print(f"{name}: FVU {before:.3f} to {after:.4f}, {sensitivity:.1e} off")
        assert STEPS * sensitivity < RTOL, f"{name} cannot be reproduced"
    stored = {name: stored[name] for name in ARCHITECTURES}
    lines = (f"{json.dumps(name)}: {json.dumps(losses)}" for name, losses in stored.items())
    STORED.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    with small_steps():
        record(sys.argv[1:])
