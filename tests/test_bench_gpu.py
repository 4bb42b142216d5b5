"""`python -m bench gpu` from start to finish on a CPU, with no more than a GPU machine has."""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import torch

from bench.gpu import guard, proof
from bench.gpu.report import short_table
from bench.gpu.step import contenders
from bench.ops import OPS
from bench.problem import SHAPES, Problem
from bench.record import NO_TIME, Record

ROOT = Path(__file__).parents[1]
MISSING = "beartype", "pynvml", "tqdm", "matplotlib"
CPU = torch.device("cpu")


def test_dry_run(tmp_path):
    """Every part, each with its stamp; a time for every contender and op."""
    for name in MISSING:
        (tmp_path / f"{name}.py").write_text("raise ImportError('not on that machine')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = ["-m", "bench", "gpu", "--dry-run", "--shapes", "B", "--commit", "abc", "--out"]
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
    assert {*parts} == {"compile", "floors", "core tests", "step", "profile", "kernels", "tests"}
    for part in parts.values():
        assert {"gpu", "torch", "triton", "python", "date"} <= part["stamp"].keys()
        assert part["stamp"]["commit"] == "abc"
    steps, kernels = parts["step"]["rows"], parts["kernels"]["rows"]
    p = Problem("B", *SHAPES["B"], CPU)
    assert [*steps] == [f"B {name}" for name in contenders(p)]
    assert [*kernels] == [f"B {op.name}" for op in sorted(OPS, key=lambda op: not op.step)]
    for row in [*(row for row in steps.values() if "skipped" not in row), *kernels.values()]:
        assert {"median", "min", "max"} == row["ms"].keys(), row
        assert "unverified" not in row
    for key, row in parts["profile"]["rows"].items():
        assert {"ms", "calls", "share"} <= next(iter(row.values())).keys(), key
    compiled = parts["compile"]["rows"]["triton"]
    assert compiled["launches"] > 20 and not compiled["not compiled"]
    assert parts["core tests"]["rows"]["pytest"]["ended"] == "all passed"


def fresh(folder: Path, *parts: str, again: bool = False) -> Record:
    record = Record(folder, CPU, 1.0, again)
    for part in parts:
        record.begin(part)
    return record


def test_a_failed_test_marks_rows_and_suppresses_none(tmp_path):
    record = fresh(tmp_path, "core tests", "tests", "step", "kernels")
    row = {"ms": {"median": 1.0}}
    for key in ("B fastsae", "B dense"):
        record.put("step", key, dict(row))
    for op in ("decode", "adam_", "jumprelu_l0", "encode_topk"):
        record.put("kernels", f"B {op}", {**row, "op": op})
    proof.mark_rows(record)
    assert record.rows("kernels")["B decode"]["unverified"] == "not tested: decode"
    passed = [f"tests/gpu/test_real_sizes.py::test_smooth[{op}-B]" for op in
              (*proof.STEP_OPS, "decode", "jumprelu_l0")]  # fmt: skip
    record.put("core tests", "pytest", {"nodes": passed, "failures": {}})
    proof.mark_rows(record)
    assert not any("unverified" in row for row in record.rows("kernels").values())
    failed = {"tests/kernels/test_sparse.py::test_decode[fp32]": "AssertionError: far off"}
    failed["tests/gpu/test_real_sizes.py::test_adam[adam_-B]"] = "boom"
    record.put("tests", "pytest", {"failures": failed})
    proof.mark_rows(record)
    rows = record.rows("kernels")
    assert rows["B decode"]["unverified"].endswith("test_decode[fp32]: AssertionError: far off")
    assert "boom" in rows["B adam_"]["unverified"]
    assert "unverified" not in rows["B jumprelu_l0"] and "unverified" not in rows["B encode_topk"]
    assert "unverified" in record.rows("step")["B fastsae"]
    assert "unverified" not in record.rows("step")["B dense"]
    assert all(row["ms"] == {"median": 1.0} for row in rows.values())


def test_outcomes_of_a_run_of_pytest(tmp_path):
    """Written test by test, with the error."""
    file, tests = tmp_path / "outcomes", tmp_path / "test_it.py"
    tests.write_text("def test_good(): pass\ndef test_bad(): assert 1 == 2, 'no'\n")
    environment = {**os.environ, "FASTSAE_OUTCOMES": str(file), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "bench.gpu.outcomes"]
    subprocess.run([*command, "-c", os.devnull, str(tests)], env=environment, cwd=tmp_path)
    good, bad = map(json.loads, file.read_text().splitlines())
    assert good[0].endswith("::test_good") and good[1:] == ["passed", ""]
    assert bad[0].endswith("::test_bad") and bad[1] == "failed" and "no" in bad[2]


def test_a_row_whose_process_died_is_an_error_and_the_rest_continues(tmp_path):
    first = fresh(tmp_path, "step")
    first.row("step", "A dense", lambda: {"ok": True})
    assert first.row("step", "A wrong", lambda: {"ok": 1 / 0})["error"].startswith("ZeroDiv")
    first.parts["running"] = "step", "A crash"
    first.save()
    second = fresh(tmp_path, "step", again=True)
    assert second.row("step", "A dense", lambda: {"ok": 1 / 0}) == {"ok": True}
    assert second.rows("step")["A crash"] == {"error": "its process died"}
    assert second.put("step", "x", {"ms": {"median": math.nan}}) == {"ms": {"median": None}}
    third = Record(tmp_path, CPU, 2.0, again=False)
    third.begin("step")
    assert third.rows("step") == {}


def test_a_process_that_dies_is_started_again(tmp_path, monkeypatch):
    codes, commands = [139, 1, guard.FAILED], []

    def call(command, env):
        commands.append(command)
        (tmp_path / f"gpu-{len(commands)}.json").touch()
        return codes.pop(0)

    monkeypatch.setattr(subprocess, "call", call)
    parser = argparse.ArgumentParser()
    guard.add_arguments(parser)
    arguments = parser.parse_args(["--dry-run", "--out", str(tmp_path)])
    assert guard.guarded(arguments) == guard.FAILED
    assert ["--again" in command for command in commands] == [False, True, True]
    monkeypatch.setattr(subprocess, "call", lambda command, env: 1)
    assert guard.guarded(arguments) == 1, "nothing was written: no use to start again"


def test_the_short_table_fits_and_keeps_what_matters(tmp_path):
    record = fresh(tmp_path, "core tests", "step", "kernels")
    shapes = [Problem(name, *SHAPES[name], CPU) for name in "BCAD"]
    failures = {f"tests/x.py::test_{n}": "e" * 300 for n in range(300)}
    record.put("core tests", "pytest", {"ended": "some failed", "failures": failures})
    for p in shapes:
        for op in OPS:
            record.put("kernels", f"{p.name} {op.name}", {"error": "e" * 300})
        for name in contenders(p):
            record.put("step", f"{p.name} {name}", {"error": NO_TIME})
    table = short_table(record)
    assert len(table) < 12_000 and table.endswith("core tests: ended some failed")
    assert "D fastsae" in table
