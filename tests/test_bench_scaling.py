"""`python -m bench scaling`: what the simulation takes from measurements, and what it stores."""

import json
from argparse import Namespace

import pytest

from bench import record, scaling
from fastsae.distributed import Axes
from fastsae.estimate.exchange import LATENCY, Received, network_seconds


def test_the_simulation(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    scaling.bench(Namespace(measure=False))
    found = json.loads((tmp_path / "scaling.json").read_text())["simulation"]
    printed = capsys.readouterr().out
    assert "simulation, not a measurement" in found["assumptions"][0]
    assert all(line in printed for line in found["assumptions"])
    rows = found["rows"]
    assert {row["kernel times"] for row in rows.values()} == {"predicted"}
    assert all(0 < row["efficiency"] < 1 for row in rows.values())
    assert {name.partition(" GPUs")[0] for name in rows} == {
        "A, 8", "A, 16", "A, 64", "D, 8", "D, 16", "D, 64", "16 M, 64"
    }  # fmt: skip

    # Steps that take twice as long as predicted: so do the kernels on a mesh.
    real = {
        f"A {contender}": {"ms": {"median": 2 * ms}}
        for contender, ms in zip(
            scaling.MEASURED.values(),
            scaling.predicted_ms(scaling.SHAPES["A"], Axes()).values(),
            strict=True,
        )
    }
    (tmp_path / "gpu-x.json").write_text(json.dumps({"step": {"rows": real}}))
    row, before = scaling.simulate("A", Axes(2, 8)), rows["A, 16 GPUs, data=2,latent=8"]
    assert row["kernel times"] == "scaled to a measurement"
    assert row["kernel ms"] == pytest.approx(2 * before["kernel ms"], rel=1e-3)
    waiting = before["step ms"] - before["kernel ms"]
    assert row["step ms"] == pytest.approx(row["kernel ms"] + waiting, rel=1e-3)
    assert scaling.simulate("D", Axes(1, 8)) == rows["D, 8 GPUs, data=1,latent=8"]


def test_the_network_of_a_simulated_gpu():
    """Along each axis, all peers send as much; those of the same node send it faster."""
    latent, data = Received("", "latent", 1500), Received("", "data", 300)
    time, near, far = network_seconds([latent, data], Axes(4, 16))
    assert (near, far) == (700, 800 + 300)
    assert time == pytest.approx(700 / 450e9 + 1100 / 50e9 + 2 * LATENCY)
    _, near, far = network_seconds([latent._replace(bytes=300), data], Axes(4, 4))
    assert (near, far) == (300 + 100, 200)
