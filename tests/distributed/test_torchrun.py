"""The command line under torchrun, as users start it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from fastsae.checkpoint import list_checkpoints
from tests.distributed.test_trainer import config, fit
from tests.train.conftest import activations as activations

STEPS = {"steps": 40, "checkpoint_every": 5, "log_every": 5}


def torchrun(*words: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *words]
    environment, pipe = {**os.environ, "OMP_NUM_THREADS": "1"}, subprocess.PIPE
    return subprocess.Popen(
        [*map(str, command)], env=environment, text=True, stdout=pipe, stderr=pipe
    )


def worker(folder: Path) -> int:
    """The process id of a process that trains in the folder and is not torchrun's own."""
    for path in Path("/proc").iterdir():
        try:
            words = (path / "cmdline").read_bytes() if path.name.isdigit() else b""
            started = b"\0LOCAL_RANK=1\0" in (path / "environ").read_bytes() if words else False
        except OSError:  # it has ended since
            continue
        if str(folder).encode() in words and started:
            return int(path.name)
    raise AssertionError(f"no process trains in {folder}")


def test_a_killed_process_ends_the_others_and_a_restart_goes_on_bit_for_bit(
    processes, activations, tmp_path
):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = [f"--d-sae=48 --k=4 --batch-size=64 --dead-after=128 --data={activations}"]
    options += [f"--{name.replace('_', '-')}={value}" for name, value in STEPS.items()]
    train = ["-m", "fastsae", "train", *" ".join(options).split(), "--resume", "auto"]
    run = torchrun("--max-restarts=1", *train, "--out", killed)
    try:
        until = time.monotonic() + 100
        while not list_checkpoints(killed / "checkpoints"):
            assert run.poll() is None and time.monotonic() < until
            time.sleep(0.02)
        os.kill(worker(killed), signal.SIGKILL)
        out, err = run.communicate(timeout=100)
    finally:
        run.kill()
    assert run.returncode == 0, err
    assert err.count("latents of width 16") == 2 and "resumed at step" in err, "one voice, twice"
    assert out.count("variance unexplained") == 1
    processes.run((1, 2), fit, config(activations, whole, **STEPS))
    one, other = ((folder / "sae" / "sae.safetensors").read_bytes() for folder in (whole, killed))
    assert one == other


def test_an_error_is_said_once(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((100, 8), np.float32))
    run = torchrun("-m", "fastsae", "train", "--data", tmp_path / "x.npy", "--out", tmp_path / "o")
    _, err = run.communicate(timeout=100)
    lines = [line for line in err.splitlines() if "fastsae: " in line]
    assert lines == ["fastsae: all sampled activations are identical"]
