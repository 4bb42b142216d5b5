"""`fastsae plan`: what it prints, and how it ends."""

import sys

import numpy as np
import pytest

from fastsae.cli import main, run

SHAPE_D = ["--d-in", "4096", "--d-sae", "1048576", "--k", "128", "--batch-size", "4096"]
SMALL = ["--d-sae", "512", "--k", "8", "--batch-size", "256", "--steps", "10"]


def rows(text: str) -> dict[str, str]:
    """The rows of a plan, by name."""
    found = [line.split(None, 1) for line in text.splitlines() if line[2:3].strip()]
    return {name: rest for name, rest in found}


def lines(capsys) -> dict[str, str]:
    """The rows that were printed, by name."""
    return rows(capsys.readouterr().out)


def test_shape_d_on_a_card_of_24_gb(monkeypatch, capsys):
    words = ["fastsae", "plan", *SHAPE_D, "--steps", "1000", "--gpu", "rtx4090"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert "does not fit" in printed.out and "weights" in printed.out
    assert printed.err.count("\n") == 1
    assert "what would fit: --mesh data=1,latent=8" in printed.err and "--d-sae" in printed.err


def test_a_mesh_of_gpus(capsys):
    run(["plan", *SHAPE_D, "--steps", "1000", "--gpu", "h200", "--mesh", "latent=8"])
    text = capsys.readouterr().out
    assert "an example price from 2025; set yours with --price" in text
    found = rows(text)
    assert "in each of 8 processes" in found["machine"]
    assert "predicted, not measured" in found["time"]
    assert found["cost"].endswith("at $28.00 per hour")
    run(["plan", *SHAPE_D, "--steps", "1000", "--gpu", "h200", "--price", "1.5"])
    text = capsys.readouterr().out
    assert rows(text)["cost"].endswith("at $1.50 per hour") and "example price" not in text


def test_this_machine(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.zeros((1000, 24), np.float32))
    run(["plan", "--data", str(tmp_path / "x.npy"), "--d-sae", "512", "--k", "8"])
    found = lines(capsys)
    assert "512 latents of width 24, 8 active per token; 600 steps" in found["run"]
    assert "from this machine's speed" in found["time"] and "limit" in found


@pytest.mark.parametrize(
    "words, why",
    [
        (["--mesh", "data=2"], "a mesh on this machine is not modeled"),
        (["--activation", "relu"], "the autograd step is not modeled: --probe measures it on this"),
        (["--gpu", "l4", "--activation", "relu"], "the autograd step is not modeled"),
        (["--gpu", "h100", "--encoder-precision", "fp32"], "an encoder in fp32 is not modeled on"),
    ],
)
def test_why_there_is_no_time(words, why, capsys):
    shape = [word for word in SMALL if word not in ("--k", "8")]
    run(["plan", "--d-in", "24", *shape, *words])
    text = capsys.readouterr().out
    assert f"not estimated, as {why}" in text
    assert ("--probe" in text) == ("--probe" in why)
    assert ("is a lower bound" in text) == ("relu" in words)


def test_unknown_memory_is_not_shown(monkeypatch, capsys):
    monkeypatch.setattr("fastsae.memory.available_memory", lambda: sys.maxsize)
    run(["plan", "--d-in", "24", *SMALL, "--mesh", "data=2"])
    assert " of " not in lines(capsys)["memory"]


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_a_probe_measures_steps(activation, capsys):
    run(["plan", "--d-in", "24", *SMALL[:2], *SMALL[4:], "--activation", activation, "--probe"])
    found = lines(capsys)
    assert "measured: 20 steps on this machine" in found["time"]
    assert float(found["time"].split()[0]) > 0


@pytest.mark.parametrize(
    "words, message",
    [
        (["--gpu", "h200", "--probe"], "--probe measures this machine alone"),
        (["--gpu", "a100-80", "--encoder-precision", "fp8"], "fp8 is for topk on a GPU with fp8"),
        (["--gpu", "h200", "--encoder-precision", "int8"], "int8 is for CPUs"),
        (["--gpu", "h200", "--mesh", "latent=3"], "must divide d_sae = 512"),
        (["--gpu", "h200", "--mesh", "latents=2"], "mesh must be like data=1,latent=8"),
        (["--model", "m", "--text", "t", "--hookpoint", "h"], "give the width of its activations"),
        (["--d-out", "8"], "give --target too"),
        (["--d-in", "0"], "d_in must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_planned(words, message):
    with pytest.raises(ValueError, match=message):
        run(["plan", *SMALL, *words])
