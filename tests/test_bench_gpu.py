"""`python -m bench gpu` from start to finish on a CPU, with no more than a GPU machine has."""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu import guard
from bench.gpu.checks import Check, outcome
from bench.gpu.checks_encode import BYS, clear, gradient_sizes
from bench.gpu.data import SHAPES, Problem
from bench.gpu.kernels import MORE_OPS
from bench.gpu.record import NO_TIME, Record
from bench.gpu.report import short_table

ROOT = Path(__file__).parents[1]
MISSING = "tyro", "beartype", "pynvml", "tqdm", "matplotlib", "hypothesis"


def test_rehearsal(tmp_path):
    """Checks, ceilings, kernels, other tiles and the step, each with its stamp."""
    for name in MISSING:
        (tmp_path / f"{name}.py").write_text("raise ImportError('not on that machine')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = ["-m", "bench", "gpu", "--rehearse", "--shapes", "B", "--commit", "abc", "--out"]
    done = subprocess.run(
        [sys.executable, *command, str(tmp_path / "out"), "--tune"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == guard.DONE, done.stdout[-3000:] + done.stderr[-3000:]
    (path,) = (tmp_path / "out").iterdir()
    parts = json.loads(path.read_text())
    order = "floors", "checks", "step", "kernels", "tune", "more checks", "more kernels"
    assert tuple(parts) == order
    for part in parts.values():
        assert {"gpu", "torch", "triton", "python", "date"} <= part["stamp"].keys()
        assert part["stamp"]["commit"] == "abc"
    rows = [row for name in ("kernels", "more kernels") for row in parts[name]["rows"].values()]
    for row in [*rows, *parts["step"]["rows"]["B"]["rows"].values()]:
        assert "line" in row or {"median", "min", "max"} == row["ms"].keys(), row
    assert {"shape", "bytes", "GB/s", "of floor"} <= parts["kernels"]["rows"]["B adam_"].keys()
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
    assert second.unfit("topk", "adam", "decode") == "failed its check: adam, topk"
    assert second.unfit("decode", "rotation") == "not checked: rotation"
    assert not second.unfit("decode")
    second.put("checks", "decode: cut", {"error": NO_TIME})
    assert second.unfit("decode") == "not checked: decode"
    assert second.put("checks", "x", {"ms": {"median": math.nan}}) == {"ms": {"median": None}}
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


def test_a_check_fails_in_most_draws_or_was_unlucky():
    def fails_with(*seeds):
        def run():
            assert torch.initial_seed() not in seeds, f"seed {torch.initial_seed()}"

        return Check("group", "name", run)

    assert outcome(fails_with(1, 2)) == {"group": "group", "ok": True}
    assert outcome(fails_with(0))["unlucky"].startswith("seed 0")
    with pytest.raises(AssertionError, match="seed 0"):
        outcome(fails_with(0, 2))


def test_gradients_of_the_encoder_are_checked_on_some_token():
    """At the widths of a GPU, where the gaps between pre-activations are smallest."""
    real = [Problem(name, *shape, torch.device("cpu")) for name, shape in SHAPES.items()]
    torch.manual_seed(0)
    for p, dtype in gradient_sizes([p._replace(N=8) for p in real]):
        for by in BYS:
            assert len(clear(p, by, dtype)[0]), (p, by, dtype)


def test_the_short_table_fits_and_keeps_what_matters(tmp_path):
    record = Record(tmp_path, torch.device("cpu"), 1.0, again=False)
    shapes = [Problem(name, *shape, torch.device("cpu")) for name, shape in SHAPES.items()]
    for part in ("checks", "step", "more kernels"):
        record.begin(part, again=False)
    for n in range(300):
        record.put("checks", f"topk: {n}", {"error": "e" * 300})
    for p in shapes:
        record.put("step", p.name, {"error": "e" * 300})
        for op in MORE_OPS:
            record.put("more kernels", f"{p.name} {op.name}", {"error": "e" * 300})
    table = short_table(record, shapes)
    assert len(table) < 12_000 and table.endswith("0 checks passed, 300 FAILED, 0 not run")
    assert "D fastsae" in table
