"""A whole race in miniature, and that each library's trainer trains in it."""

import json
from dataclasses import replace
from functools import partial
from importlib import import_module

import pytest
import torch

from bench import record
from bench.peers import race, report
from bench.peers.contender import CONTENDERS, SAME_LR, quality
from bench.peers.stream import TimeUp, open_stream
from bench.peers.task import Task
from fastsae.data import ShardWriter, Synthetic

TINY = 256, 16, 96, 4  # tokens enough for accelerated SAEs to take our ops


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Activations in shards, with a held-out part."""
    folder = tmp_path_factory.mktemp("acts")
    source = Synthetic(d_in=16, n_latents=48, active=3, n_tokens=4096, noise=0.05)
    for part, out in {"train": folder, "heldout": folder / "heldout"}.items():
        rows = replace(source, part=part).rows(torch.arange(4096 if part == "train" else 512))
        writer, labels = ShardWriter(out, 16), torch.arange(len(rows))
        writer.append(3 * rows, labels, labels, labels)
        writer.finish()
    return folder


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Threads that wait for each other at every little step take long on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(before)


def task(contender: str, data, **settings) -> Task:
    size = race.sized(TINY)
    return Task(contender=contender, **size, device="cpu", data=data and str(data), **settings)


def test_a_race(data, tmp_path, monkeypatch):
    """Results, tables and a picture of contenders that are here; others are said to be missing."""
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setitem(
        CONTENDERS, "nobody", CONTENDERS["sparsify"]._replace(package="not-a-package")
    )
    names = ["fastsae", "fastsae, bf16 encoder", "dense PyTorch", "nobody"]
    text = race.bench({"tiny": TINY}, 1, 60, names, data, trained=TINY, turn=0.02)
    (results,) = tmp_path.glob("peers-*.json")
    found = json.loads(results.read_text())
    assert found.keys() == {"tiny", "training"}
    for part in found.values():
        assert part["contenders"].keys() == set(names[:3])
        assert part["missing"] == {"nobody": "not-a-package is not installed"}
        assert {"cpu", "torch", "commit", "versions"} <= part.keys()
    for row in found["tiny"]["contenders"].values():
        assert 0 < row["ms"]["min"] <= row["ms"]["median"] <= row["ms"]["max"]
        assert row["peak MB"] > 100 and row["tokens/s"] > 0
    runs = found["training"]["contenders"]
    fvu = {name: row["held-out FVU"] for name, row in runs.items()}
    assert fvu["fastsae"] < 0.8
    assert fvu["dense PyTorch"] == pytest.approx(fvu["fastsae"], rel=1e-3)
    assert fvu["fastsae, bf16 encoder"] == pytest.approx(fvu["fastsae"], rel=2e-2)
    assert all(row["L0"] <= 4 and row["tokens/s"] > 0 for row in runs.values())
    assert "- nobody: not-a-package is not installed" in text
    assert all(f"| {name} | " in text for name in names[:3])
    assert results.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_contender_that_fails_is_reported():
    """With its reason, and without another turn."""
    bad = {**race.sized(TINY), "d_sae": 2, "device": "cpu", "seconds": 0.01}
    found = race.race("tiny", bad, ["fastsae"], rounds=2)
    assert found["fastsae"]["error"].startswith("ValueError: k")


def test_what_the_user_can_get_wrong(data):
    with pytest.raises(ValueError, match="contenders are fastsae; .*: got nobody"):
        race.bench({}, 1, 0, ["nobody"])
    with pytest.raises(ValueError, match="steps must be at least 3, or 0"):
        race.bench({}, 1, 2)
    with pytest.raises(ValueError, match="rounds or steps must be above 0, got 0 and 0"):
        race.bench({}, 0, 0)
    with pytest.raises(ValueError, match="must have a held-out part"):
        race.bench({}, 1, 3, data=data / "heldout")
    with pytest.raises(ValueError, match="shapes here are .*: got z"):
        race.chosen(["z"])


def test_a_stream_gives_the_same_batches_and_ends_when_time_is_up(data):
    streams = [open_stream(task("fastsae", data)) for _ in range(2)]
    for _ in range(70):  # more than an epoch
        first, second = map(next, streams)
        assert torch.equal(first, second)
    assert len(streams[0].step_ms()) == 68, "neither the first step nor one that has not ended"
    assert streams[0].sample.square().mean() == pytest.approx(1.0, rel=0.05)
    stream = open_stream(task("fastsae", None, seconds=1e-9))
    for _ in range(2):
        next(stream)
    with pytest.raises(TimeUp):
        next(stream)
    assert len(stream.step_ms()) == 1


def test_goals():
    """Against the fastest and the best peer, whichever learning rate it had."""
    times = {"fastsae": 10.0, "fastsae, bf16 encoder": 9.0, "sparsify": 16.0, "SAELens": 40.0}
    said = report.speed_goals({name: {"ms": {"median": ms}} for name, ms in times.items()})
    assert said[0].endswith("1.60 times as fast as the fastest peer (goal: 1.5), sparsify: met")
    assert said[1].endswith("1.78 times as fast as the fastest peer (goal: 2.2), sparsify: NOT met")
    fvu = {"fastsae": 0.2, "SAELens": 0.3, "SAELens" + SAME_LR: 0.1, "dense PyTorch": 0.0}
    said = report.quality_goals({name: {"held-out FVU": value} for name, value in fvu.items()})
    assert said == [
        f"- fastsae: FVU 0.2000, the best peer's 0.1000 (goal: no more), SAELens{SAME_LR}: NOT met"
    ]
    assert not report.speed_goals({"fastsae": {"ms": {"median": 1.0}}})


@pytest.mark.filterwarnings("ignore")  # of the libraries
@pytest.mark.parametrize("name", [name for name, one in CONTENDERS.items() if one.package])
def test_a_peer_trains(name, data):
    """Its own loop lowers the held-out FVU on the stream's batches, and takes a learning rate."""
    contender = CONTENDERS[name]
    if name in race.installed([name])[1]["missing"]:
        pytest.skip(f"{contender.package} is not installed")
    torch.use_deterministic_algorithms(False)  # they are not asked to be
    train = import_module(f"bench.peers.train_{contender.trainer}").train
    shards = race.training_data(data)

    def trained(**settings):
        one = task(name, data, **settings)
        stream = open_stream(one)
        result = train(one, stream, **contender.options)
        assert len(stream.step_ms()) in (one.steps - 2, one.steps - 1)
        return result

    measured = partial(quality, shards=shards, device="cpu")
    short, long = trained(steps=3), trained(steps=200)
    before, after = measured(short.code), measured(long.code)
    assert after["held-out FVU"] < min(0.9, 0.9 * before["held-out FVU"])
    assert 0 < after["L0"] <= 4
    if contender.adam:
        assert trained(steps=40, lr=3e-3).lr == 3e-3
    timed = replace(task(name, None), seconds=0.05)
    stream = open_stream(timed)
    with pytest.raises(TimeUp):
        train(timed, stream, **contender.options)
    assert stream.step_ms()
