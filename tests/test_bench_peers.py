"""A whole race in miniature, and that each library's trainer trains in it."""

import argparse
import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from importlib import import_module

import pytest
import torch
from matplotlib.figure import Figure

from bench import record
from bench.contender import LOW
from bench.peers import accelerate, race, training
from bench.peers.classes import PHASES, SUBJECTS
from bench.peers.contender import CONTENDERS, KNOWN, quality
from bench.peers.report import (
    colors_of,
    plain,
    plot_training,
    tables,
    training_rows,
    training_table,
)
from bench.peers.task import Task, TimeUp, open_stream
from bench.problem import parse_shape
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


SERVER = """
import json, sys
from contextlib import redirect_stdout
from bench.peers.contender import Task, measure

for line in sys.stdin:
    with redirect_stdout(sys.stderr):
        found = measure(Task(**json.loads(line)))
    print(json.dumps(found), flush=True)
"""


@pytest.fixture(scope="module")
def server():
    """One process for all contenders: starting one for each takes longer than their tasks."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", SERVER], **pipes) as process:
        assert process.stdin and process.stdout
        yield process
        process.stdin.close()


@pytest.fixture
def one_process(server, monkeypatch):
    def run(task: Task) -> dict:
        print(json.dumps(asdict(task)), file=server.stdin, flush=True)
        return json.loads(server.stdout.readline())

    for module in (race, training):
        monkeypatch.setattr(module, "run", run)


def task(contender: str, data, **settings) -> Task:
    size = race.sized(TINY)
    return Task(contender=contender, **size, device="cpu", data=data and str(data), **settings)


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    race.add_arguments(parser)
    return parser.parse_args(words)


def test_a_race(data, tmp_path, monkeypatch, capsys, one_process):
    """Results, tables and a plot of contenders that are installed; others are listed as missing."""
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    nobody = CONTENDERS["sparsify"]._replace(package="not-a-package")
    for table in (CONTENDERS, KNOWN):
        monkeypatch.setitem(table, "nobody", nobody)
    low = [f"fastsae, {name} encoder" for name in LOW[-1:]]
    names = ["fastsae", *low, "dense PyTorch", "nobody"]
    monkeypatch.setattr(race, "TURN", 0.02)
    monkeypatch.setitem(race.SHAPES, "a", TINY)
    monkeypatch.setattr(training, "GRID", (2e-3, 1e-4))
    monkeypatch.setattr(race, "GRID", training.GRID)
    words = ["--shapes", "a", "--rounds", "1", "--steps", "60", "--data", str(data)]
    words += ["--seeds", "2", "--tokens", "128", "--latents", "80", "--contenders", *names]
    with record.alone(), pytest.raises(ValueError, match="a race is writing to"):
        race.bench(parse(*words))
    race.bench(parse(*words))
    text = capsys.readouterr().out
    (results,) = tmp_path.glob("peers-*.json")
    found = json.loads(results.read_text())
    shape, trained = found
    assert shape == "a" and trained.startswith(f"training, {data.name}, 128 per step, 80 latents, ")
    assert [found[part][size] for part in found for size in ("tokens", "d_sae")] == [
        256,
        96,
        128,
        80,
    ]
    for part in found.values():
        assert part.get("contenders", part.get("runs", {}).get("60")).keys() == set(names[:-1])
        assert part["missing"] == {"nobody": "not-a-package is not installed"}
        assert {"cpu", "torch", "commit", "versions"} <= part.keys()
    for row in found["a"]["contenders"].values():
        assert 0 < row["ms"]["min"] <= row["ms"]["median"] <= row["ms"]["max"]
        assert row["peak MB"] > 100 and row["tokens/s"] > 0
    runs = found[trained]["runs"]["60"]
    for tried in runs.values():
        assert [(one["rate"], one["seed"]) for one in tried] == [(2e-3, 0), (1e-4, 0), (2e-3, 1)]
        assert all(one["L0"] <= 4 and one["seconds"] > 0 and one["warm-up"] == 3 for one in tried)
        assert not any("peak MB" in one for one in tried), "it would be that of evaluations"
        assert tried[0]["held-out FVU"] < tried[1]["held-out FVU"], "the best rate is repeated"
        for one in tried:
            curve = [point["held-out FVU"] for point in one["curve"]]
            assert [point["step"] for point in one["curve"]] == [3, 7, 15, 30, 60]
            assert curve[0] > curve[-1] == one["held-out FVU"], "of all 512 held-out tokens"
    fvu = {name: [one["held-out FVU"] for one in tried] for name, tried in runs.items()}
    assert max(fvu["fastsae"][::2]) < 0.8 and fvu["fastsae"][0] != fvu["fastsae"][2]
    assert fvu["dense PyTorch"] == pytest.approx(fvu["fastsae"], rel=1e-3)
    for name in low:
        assert fvu[name] == pytest.approx(fvu["fastsae"], rel=2e-2)
    assert "- nobody: not-a-package is not installed" in text
    assert all(f"| {name} | " in text for name in names[:-1])
    plots = [*tmp_path.glob("*.png")]
    assert len(plots) == 2 and all(one.read_bytes().startswith(b"\x89PNG") for one in plots)
    assert len(colors_of([*KNOWN])) == len({plain(name) for name in KNOWN})
    before = results.read_text()
    monkeypatch.setattr(training, "run", None)  # nothing is left to run
    race.bench(parse("--rounds", "0", *words[4:]))
    assert results.read_text() == before
    found[trained]["runs"]["60"]["dense PyTorch"][1]["warm-up"] = 4
    results.write_text(json.dumps(found))
    message = "has runs of dense PyTorch with 4 steps of warm-up, but at most 3 of 60 are allowed"
    with pytest.raises(ValueError, match=message):
        race.bench(parse("--rounds", "0", *words[4:]))


def test_a_contender_is_a_process_and_reported_if_it_fails():
    """With its reason, and without another turn."""
    tiny = {**race.sized(TINY), "device": "cpu", "seconds": 0.01}
    found = race.race("tiny", tiny, ["fastsae"], rounds=1)
    assert found["fastsae"]["ms"]["median"] > 0
    found = race.race("tiny", {**tiny, "d_sae": 2}, ["fastsae"], rounds=2)
    assert found["fastsae"]["error"].startswith("ValueError: k")


def test_variants(data, tmp_path, monkeypatch, one_process):
    """Into a file of their own."""
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setitem(race.SHAPES, "a", TINY)
    names = ["fastsae, FVU", "dense PyTorch"]
    words = ["--variants", "--rounds", "0", "--steps", "20", "--seeds", "1", "--data", str(data)]
    race.bench(parse(*words, "--contenders", *names))
    (results,) = tmp_path.glob("variants-*.json")
    (found,) = json.loads(results.read_text()).values()
    runs = found["runs"]["20"]
    assert [*runs] == names and {"commit", "torch"} <= found.keys()
    for (row,) in runs.values():
        assert row["rate"] is None and row["lr"] > 0
        assert 0 < row["held-out FVU"] < 1.5 and 0 <= row["never active"] <= 1
        assert row["L0"] <= 4 and row["seconds"] >= 0


def test_the_committed_results_have_tables():
    for kind in ("peers", "variants"):
        for path in record.RESULTS.glob(f"{kind}-*.json"):
            assert "| fastsae | " in tables(json.loads(path.read_text()))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--contenders nobody", r"unknown contenders: nobody \(allowed: fastsae; "),
        ("--variants --contenders SAELens", r"unknown contenders: SAELens \(allowed: fastsae; "),
        ("--steps 300 2", r"steps must be at least 3, or 0 for no training, got \[300, 2\]"),
        ("--tokens 0", "tokens must be at least 1, got 0"),
        ("--latents 0", "latents must be at least 1, got 0"),
        ("--seeds 0", "seeds must be at least 1, got 0"),
        ("--rounds 0 --steps 0", r"rounds or steps must be above 0, got 0 and \[0\]"),
        ("--data {data}/heldout", "must have a held-out part"),
        ("--shapes z", r"unknown shapes for this machine: z \(allowed: "),
    ],
)
def test_what_the_user_can_get_wrong(words, message, data):
    with pytest.raises(ValueError, match=message):
        race.bench(parse(*words.format(data=data).split()))


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

    measured, curve = partial(quality, shards=shards, device="cpu"), {}

    def trained(**settings):
        one = task(name, data, **settings)
        stream = open_stream(one)
        stream.at_step = lambda step, code: curve.update({step: measured(code)})
        result = train(one, stream, **contender.options)
        assert stream.code is not None
        for key, value in measured(stream.code()).items():
            assert measured(result.code)[key] == pytest.approx(value, rel=1e-5)
        assert len(stream.step_ms()) in (one.steps - 2, one.steps - 1)
        return result

    short, long = trained(steps=3), trained(steps=200, curve=(100,))
    before, after = measured(short.code), measured(long.code)
    assert [*curve] == [100] and curve[100]["held-out FVU"] < before["held-out FVU"]
    assert after["held-out FVU"] < min(0.9, 0.9 * before["held-out FVU"])
    assert 0 < after["L0"] <= 4
    if contender.adam:
        assert trained(steps=40, lr=3e-3).lr == 3e-3
    timed = replace(task(name, None), seconds=0.05)
    stream = open_stream(timed)
    with pytest.raises(TimeUp):
        train(timed, stream, **contender.options)
    assert stream.step_ms()


def test_a_plot_tells_finished_runs_from_curves():
    """Every finished run has a marker; the longest run's curve is a line that leads to its own."""

    def run(fvu: float, *curve: tuple[int, float]) -> dict:
        points = [{"step": step, "held-out FVU": y, "never active": 0.0} for step, y in curve]
        end = {"rate": None, "seed": 0, "held-out FVU": fvu, "never active": 0.0}
        return end | ({"curve": points} if points else {})

    runs = {"80": {"A": [run(0.2, (20, 0.6), (40, 0.4), (80, 0.21))]}, "30": {"A": [run(0.3)]}}
    plot_training(figure := Figure(), {"runs": runs, "tokens": 10**5})
    drawn = {
        (line.get_marker(), line.get_linestyle()): torch.as_tensor(line.get_xydata()).tolist()
        for line in figure.axes[0].lines
    }
    assert drawn == {
        ("o", "None"): [[3.0, 0.3], [8.0, 0.2]],
        ("None", "-"): [[2.0, 0.6], [4.0, 0.4]],
        ("None", ":"): [[4.0, 0.4], [8.0, 0.2]],
    }
    assert "has not fully decayed" in figure.get_suptitle()
    plot_training(figure := Figure(), {"runs": {"30": runs["30"]}, "tokens": 10**5})
    assert not figure.get_suptitle() and [len(axes.lines) for axes in figure.axes] == [1, 1]


def test_an_accelerated_run_stands_for_its_library():
    """With the library's own time, which was measured in turns; others have none."""
    run = {"rate": None, "seed": 0, "held-out FVU": 0.1, "never active": 0.0, "L0": 4.0}
    timed = {
        name: {"ms": {"median": ms}} for name, ms in {"A": 500.0, "A, accelerated": 100.0}.items()
    }
    runs = {"10": {"A, accelerated": [run | {"seconds": 9.0}], "B": [run | {"seconds": 3.0}]}}
    (rows,) = training_rows({"contenders": timed, "runs": runs}).values()
    assert [row["held-out FVU"] for row in rows.values()] == [0.1] * 3
    seconds = {name: row["seconds"] for name, row in rows.items()}
    untimed = {"B": pytest.approx(math.nan, nan_ok=True)}
    assert seconds == {"A": 5.0, "A, accelerated": 1.0} | untimed
    for timing in (timed, {}):
        found = {"contenders": timing, "runs": runs, "tokens": 100}
        assert ("| seconds |" in training_table(training_rows(found)["10"])) == bool(timing)
        plot_training(figure := Figure(), found)
        labels = [axes.get_xlabel() for axes in figure.axes]
        assert ("seconds" in labels) == bool(timing)


@pytest.mark.filterwarnings("ignore")  # of the libraries
@pytest.mark.parametrize("name", SUBJECTS)
def test_every_class_is_compared_in_every_phase(name):
    """It has the phase's number of active latents, and both steps run."""
    library = name.split()[0]
    pytest.importorskip("sae_lens" if library == "SAELens" else library)
    torch.use_deterministic_algorithms(False)
    for phase in PHASES.values():
        found = accelerate.compare(name, TINY, phase, rounds=1)
        assert found["ratio"] == found["of all time"] > 0 and found["rounds"] == 1
    subject, x = SUBJECTS[name](TINY), torch.randn(256, 16)
    if subject.shifted is not None:
        subject.enter(PHASES["middle"], x)
        active = subject.sae.encode(x) != 0
        assert active.float().mean() == pytest.approx(1 / 32, rel=0.05)


def test_phases_keep_their_own_stamp(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    for commit, phase in {"a": "start", "b": "middle", "c": "middle"}.items():
        monkeypatch.setattr(record, "source_commit", lambda commit=commit: commit)
        accelerate.keep("some", TINY, {phase: {"ratio": 1.0}})
    (results,) = tmp_path.iterdir()
    (found,) = json.loads(results.read_text()).values()
    assert {phase: row["commit"] for phase, row in found["phases"].items()} == {
        "start": "a",
        "middle": "c",
    }


def test_comparisons_of_processor_time_need_one_thread(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    parser = argparse.ArgumentParser()
    accelerate.add_arguments(parser)
    with pytest.raises(ValueError, match="OMP_NUM_THREADS=1, got 4"):
        accelerate.bench(parser.parse_args([]))


def test_the_interval_holds_the_median():
    """Known values for 95% from the binomial distribution, and rounds end when it is narrow."""
    for n, skipped in {5: 0, 6: 0, 8: 0, 9: 1, 20: 5, 100: 39}.items():
        values = [float(i) for i in torch.randperm(n)]
        assert accelerate.interval(values) == (skipped, n - 1 - skipped)
    assert accelerate.narrow(0.99, 1.01) and not accelerate.narrow(0.98, 1.02)
    assert accelerate.narrow(1.96, 2.04) and not accelerate.narrow(1.9, 2.1)


def test_the_committed_comparison_of_classes_is_whole_and_none_is_slower():
    for path in record.RESULTS.glob("accelerate-*.json"):
        results = json.loads(path.read_text())
        size = parse_shape(accelerate.SHAPE)
        rows = {name: results[accelerate.key_of(name, size)]["phases"] for name in SUBJECTS}
        assert all(found.keys() == PHASES.keys() for found in rows.values())
        assert accelerate.table(rows).count("x, ") == len(SUBJECTS) * len(PHASES)
        assert all(row["ratio"] >= 0.97 for found in rows.values() for row in found.values())
