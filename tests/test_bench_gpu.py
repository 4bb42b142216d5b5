"""`python -m bench gpu` from start to finish on a CPU, with no more than a GPU machine has."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from bench.gpu import guard
from bench.gpu.record import Record

ROOT = Path(__file__).parents[1]
MISSING = "tyro", "beartype", "pynvml", "tqdm", "matplotlib", "hypothesis"


def test_rehearsal(tmp_path):
    """Checks, ceilings, kernels, other tiles and the step, each with its stamp."""
    for name in MISSING:
        (tmp_path / f"{name}.py").write_text("raise ImportError('not on that machine')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = ["-m", "bench", "gpu", "--rehearse", "--tune", "--shapes", "B", "--out"]
    done = subprocess.run(
        [sys.executable, *command, str(tmp_path / "out")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == guard.DONE, done.stdout[-3000:] + done.stderr[-3000:]
    (path,) = (tmp_path / "out").iterdir()
    parts = json.loads(path.read_text())
    assert list(parts) == ["checks", "floors", "kernels", "tune", "step"]
    for part in parts.values():
        assert {"gpu", "torch", "triton", "python", "commit", "date"} <= part["stamp"].keys()
    rows = [*parts["kernels"]["rows"].values(), *parts["step"]["rows"]["B"]["rows"].values()]
    for row in rows:
        assert "line" in row or {"median", "min", "max"} == row["ms"].keys(), row
    assert "TRITON_WINS" in done.stdout and "0 FAILED" in done.stdout


def test_a_row_whose_process_died_is_an_error_and_the_rest_goes_on(tmp_path):
    arguments = tmp_path, torch.device("cpu"), 1.0
    first = Record(*arguments, again=False)
    first.begin("checks", again=False)
    first.row("checks", "decode: fine", lambda: {"ok": True})
    assert first.row("checks", "topk: wrong", lambda: {"ok": 1 / 0})["error"].startswith("ZeroDiv")
    first.parts["running"] = "checks", "adam: crash"
    first.save()
    second = Record(*arguments, again=True)
    second.begin("checks", again=True)
    assert second.row("checks", "decode: fine", lambda: {"ok": 1 / 0}) == {"ok": True}
    assert second.failed_groups() == {"topk", "adam"}
    third = Record(*arguments[:2], 2.0, again=False)
    third.begin("checks", again=False)
    assert third.rows("checks") == {}


def test_a_process_that_dies_is_started_again(tmp_path, monkeypatch):
    codes, commands = [139, 1, guard.FAILED], []

    def call(command, env):
        commands.append(command)
        (tmp_path / f"gpu-{len(commands)}.json").touch()
        return codes.pop(0)

    monkeypatch.setattr(subprocess, "call", call)
    parser = argparse.ArgumentParser()
    guard.add_arguments(parser)
    arguments = parser.parse_args(["--rehearse", "--out", str(tmp_path)])
    assert guard.guarded(arguments) == guard.FAILED
    assert ["--again" in command for command in commands] == [False, True, True]
    monkeypatch.setattr(subprocess, "call", lambda command, env: 1)
    assert guard.guarded(arguments) == 1, "nothing was written: no use to start again"
