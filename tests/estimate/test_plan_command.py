"""`fastsae plan`: what it prints, and how it ends."""

import numpy as np
import pytest

from fastsae.cli import main, run

SHAPE_D = ["--d-in", "4096", "--d-sae", "1048576", "--k", "128", "--batch-size", "4096"]
SMALL = ["--d-sae", "512", "--k", "8", "--batch-size", "256", "--steps", "10"]


def lines(capsys) -> dict[str, str]:
    """The rows that were printed, by name."""
    text = capsys.readouterr().out
    rows = [line.split(None, 1) for line in text.splitlines() if line[2:3].strip()]
    return {name: rest for name, rest in rows}


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
    found = lines(capsys)
    assert "in each of 8 processes" in found["machine"]
    assert "predicted, not measured" in found["time"]
    assert found["cost"].endswith("at $28.00 per hour")
    run(["plan", *SHAPE_D, "--steps", "1000", "--gpu", "h200", "--price", "1.5"])
    assert lines(capsys)["cost"].endswith("at $1.50 per hour")


def test_this_machine(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.zeros((1000, 24), np.float32))
    run(["plan", "--data", str(tmp_path / "x.npy"), "--d-sae", "512", "--k", "8"])
    found = lines(capsys)
    assert "512 latents of width 24, 8 active per token; 600 steps" in found["run"]
    assert "from this machine's speed" in found["time"] and "limit" in found


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
        (["--d-in", "0"], "d_in must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_planned(words, message):
    with pytest.raises(ValueError, match=message):
        run(["plan", *SMALL, *words])
