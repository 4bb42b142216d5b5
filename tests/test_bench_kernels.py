"""`python -m bench kernels`: every op, its options and what it refuses."""

import argparse
import json
import math

import pytest
import torch

import fastsae_kernels
from bench import __main__, kernels
from bench.ops import OPS
from bench.problem import Problem, parse_shape
from bench.record import machine
from bench.roofs import Roofs

ROOFS = Roofs(1e10, {"fp32": 1e11})
TINY = 20, 12, 40, 3


def problem(**changes) -> Problem:
    return Problem("tiny", *TINY, torch.device("cpu"), torch.float32, dry=True)._replace(**changes)


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    kernels.add_arguments(parser)
    return parser.parse_args(words)


def test_every_public_op_is_there():
    functions = {op.function for op in OPS}
    assert functions >= {*fastsae_kernels.__all__, "adam_", "rotation_gradients"}
    names = [op.name for op in OPS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_an_op(op):
    """Forward, and backward where it has one: a time, a cost and plain PyTorch's time."""
    for backward in (False, True)[: 1 + op.gradients]:
        row = kernels.op_row(op, problem(), ROOFS, backward, ("torch",))
        assert row["ms"]["median"] > 0 and row["bytes"] > 0 and row["of roof"] > 0, row
        assert row["torch"]["ratio"] > 0, row["torch"]
        assert "ms" in row and op.function == row["op"]
        assert kernels.line(row) and kernels.line({**row, "of roof": None}), "no roof was measured"


@pytest.mark.parametrize("op", [op for op in OPS if op.torch_make is None], ids=lambda op: op.name)
def test_plain_pytorch_computes_the_same(op):
    """Its first output, or the sum of codes that it makes dense: else it is no baseline."""
    torch.manual_seed(0)
    p = problem()
    arguments = op.make(p)
    got, expected = op.run(*arguments), op.torch(*arguments)
    got, expected = (t[0] if isinstance(t, tuple) else t for t in (got, expected))
    if op.function in ("encode_above", "encode_topk_batch", "topk_batch"):
        got, expected = got.sum(), expected.sum()
    if op.function == "latent_major":
        expected = op.torch(*arguments)[1]
    torch.testing.assert_close(got.float(), expected.float().view_as(got), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("spread", ["uniform", "zipf", "hot"])
def test_indices(spread):
    """Distinct within a token and in range; hot: one is in every token."""
    p = problem(N=200, spread=spread)
    indices = p.indices()
    assert indices.shape == (p.N, p.K) and indices.min() >= 0 and indices.max() < p.F
    assert (indices.sort(1).values.diff(dim=1) > 0).all()
    most = int(torch.bincount(indices.flatten()).max())
    assert (most == p.N) == (spread == "hot")


def test_json_and_a_sweep_with_its_plot(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "measure_roofs", lambda p, rates: ROOFS)
    file, plot = tmp_path / "rows.json", tmp_path / "plot.png"
    words = [
        "--op",
        "decode",
        "--shape",
        "20,12,40,3",
        "--sweep",
        "F",
        "--against",
        "torch",
        "--indices",
        "hot",
    ]
    kernels.bench(parse(*words, "--json", str(file), "--plot", str(plot)))
    found = json.loads(file.read_text())
    assert {"cpu", "torch", "commit"} <= found["stamp"].keys()
    assert found["roof"] == {"bandwidth": 1e10, "rates": {"fp32": 1e11}}
    assert [row["shape"]["F"] for row in found["rows"]] == [10, 20, 40, 80, 160]
    for row in found["rows"]:
        assert row["dtype"] == "fp32" and row["indices"] == "hot" and not row["backward"]
        assert math.isclose(row["roof ms"], row["bytes"] / 1e10 * 1e3, rel_tol=1e-3)
    assert plot.read_bytes().startswith(b"\x89PNG")
    kernels.bench(parse(*words[:4], "--backward", "--json", str(file)))
    assert json.loads(file.read_text())["rows"][0]["backward"]


def test_one_launch_for_the_profiler(capsys):
    kernels.bench(parse("--ncu", "squared_error", "--shape", "20,12,40,3"))
    command, time = capsys.readouterr().out.splitlines()
    assert command.startswith("ncu ") and "-o squared_error" in command and "bench" in command
    assert time.startswith("squared_error: ") and time.endswith(" ms")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--op nothing", r"unknown ops: nothing \(allowed: encode_topk; "),
        ("--op adam_ --backward", "adam_ has no gradient"),
        ("--shape 1,2", "shape must be one of a, .*; got '1,2'"),
        ("--shape 4,4,4,5", "shape must be one of"),
        ("--indices all", r"unknown indices: all \(allowed: uniform; zipf; hot\)"),
        ("--op decode topk --sweep F --plot x.png", "--plot shows one op"),
        ("--op decode --plot x.png", "--plot shows one op over a --sweep"),
    ],
)
def test_what_the_user_can_get_wrong(words, message, monkeypatch, capsys):
    """One line that says what is allowed."""
    with pytest.raises(ValueError, match=message):
        kernels.bench(parse(*words.split()))
    monkeypatch.setattr("sys.argv", ["bench", "kernels", *words.split()])
    with pytest.raises(SystemExit):
        __main__.main()
    assert len(capsys.readouterr().err.splitlines()[-1:]) == 1


def test_shapes_by_letter():
    assert parse_shape("A") == (8192, 4096, 131072, 64)
    assert parse_shape("8,4,16,2") == (8, 4, 16, 2)


@pytest.mark.parametrize(
    ("processor", "name"),
    [
        (("AMD", "avx2"), "amd-avx2"),
        (("Intel", "avx512_f"), "intel"),
        (("other", "other"), "other"),
    ],
)
def test_names_of_result_files(monkeypatch, processor, name):
    monkeypatch.setattr("bench.record.processor", lambda: processor)
    assert machine() == name
    assert machine("cuda") == "cuda"
