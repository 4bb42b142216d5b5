"""Training straight from a model: the rows of a harvest, mixed; runs that go on bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import fastsae
from fastsae.cli.eval import main as evaluate
from fastsae.cli.sweep import main as sweep
from fastsae.cli.train import main as train
from fastsae.data import HarvestConfig, Joined, ModelProducer, Stream, StreamConfig, harvest_each
from fastsae.data.mixing import DOCUMENT
from fastsae.data.model import load_model, load_tokenizer

pytestmark = pytest.mark.usefixtures("undrawn")
WORDS = ("the", "best", "of", "times", "was", "it", "def", "return", "x", "+", "1", "while")
HOOKS = "transformer.h.1", "transformer.h.2.mlp:in"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Sixty documents of different lengths."""
    folder = tmp_path / "text"
    folder.mkdir()
    draw = random.Random(0)
    for n in range(60):
        words = [draw.choice(WORDS) for _ in range(20 + 3 * n)]
        (folder / f"{n:02d}.txt").write_text(" ".join(words))
    return folder


def settings(gpt2: Path, text: Path, **changes: Any) -> dict[str, Any]:
    kept: dict[str, Any] = {
        "model": str(gpt2),
        "hookpoint": HOOKS,
        "text": (str(text),),
        "context_length": 32,
        "batch_tokens": 128,
        "heldout_fraction": 0.2,
    }
    return kept | changes


def words(out: Path, gpt2: Path, text: Path, *more: str, hookpoints: Any = HOOKS[:1]) -> list[str]:
    """A run of 24 steps in a second or two."""
    source = ["--model", str(gpt2), "--hookpoint", *hookpoints, "--text", str(text)]
    source += ["--context-length", "32", "--batch-tokens", "128", "--buffer-tokens", "1500"]
    run = "--steps 24 --batch-size 200 --d-sae 96 --k 4 --log-every 5 --checkpoint-every 7"
    return [*source, *run.split(), "--heldout-fraction", "0.2", "--out", str(out), *more]


def test_rows_are_those_of_a_harvest(gpt2: Path, text: Path, tmp_path: Path):
    """Bit for bit: the same documents, the same held-out ones, each row once in a pass."""
    kept = settings(gpt2, text)
    folders = harvest_each(HarvestConfig(out=tmp_path / "acts", **kept), progress=False)
    whole = Joined(*folders.values())
    config, stream = StreamConfig(buffer_tokens=4096, **kept).open("cpu")
    assert stream.d_in == whole.d_in and config.buffer_tokens == 4096
    assert whole.heldout is not None and stream.heldout is not None
    for one, other in ((whole.heldout, stream.heldout),):
        rows = torch.arange(one.n_tokens)
        assert torch.equal(one.rows(rows), other.rows(rows))
        for ours, theirs in zip(other.contexts(rows), one.contexts(rows), strict=True):
            assert torch.equal(ours, theirs)
    with stream.batches(50) as batches:
        drawn = [next(batches) for _ in range(whole.n_tokens // 50)]
    stored = labeled(whole, torch.arange(whole.n_tokens))
    found = [
        (*divmod(number, DOCUMENT), *row)
        for batch in drawn
        for number, row in zip(batch.rows.tolist(), batch.x.tolist(), strict=True)
    ]
    in_buffer = stream.buffer_tokens + 4 * 128  # a block ends with a group
    assert Counter(found[:-in_buffer]) <= Counter(stored) and {*found} <= {*stored}
    assert found[:100] != stored[:100]


def labeled(source: Joined, rows: torch.Tensor) -> list[tuple[float, ...]]:
    """Document, position and values of each row."""
    _, positions, documents = source.contexts(rows)
    triples = zip(documents.tolist(), positions.tolist(), source.rows(rows).tolist(), strict=True)
    return [(document, position, *row) for document, position, row in triples]


def test_a_run_on_a_stream_and_its_evaluation(gpt2: Path, text: Path, tmp_path: Path):
    out = tmp_path / "run"
    table = train(words(out, gpt2, text))
    assert "held-out data" in table
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["fvu"] < 0.9 * lines[0]["fvu"]
    assert all(line["documents_per_batch"] > 5 for line in lines)
    assert 0 < lines[0]["model_seconds"] <= lines[-1]["model_seconds"]
    summary = json.loads((out / "summary.json").read_text())
    report = evaluate([str(out), "--windows", "4", "--batch-windows", "4"])
    assert "cross-entropy" in report
    found = json.loads((out / "eval.json").read_text())
    assert found["reconstruction"]["fvu"] == pytest.approx(summary["fvu"], rel=1e-6)
    metadata = json.loads((out / "sae_lens" / "cfg.json").read_text())["metadata"]
    assert metadata["hf_hook_name"] == HOOKS[0] and metadata["model_name"] == str(gpt2)


def test_a_killed_run_resumes_bit_for_bit(gpt2: Path, text: Path, tmp_path: Path):
    train(words(tmp_path / "whole", gpt2, text))
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "fastsae", "train", *words(out, gpt2, text)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not list(out.glob("checkpoints/step-*14")) and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    train(["--resume", "--out", str(out)])
    for name in ("sae/sae.safetensors", "sae/config.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_each_hookpoint_is_trained_as_if_alone(gpt2: Path, text: Path, tmp_path: Path):
    """One pass over the text for two SAEs at each of two sites, one of them by a glob."""
    out, names = tmp_path / "sites", ("transformer.h.1", "transformer.h.[23].mlp")
    table = train(words(out, gpt2, text, hookpoints=names))
    sites = ["transformer.h.1", "transformer.h.2.mlp", "transformer.h.3.mlp"]
    assert all(site in table for site in sites)
    for site in sites[:2]:
        alone = tmp_path / f"alone-{site}"
        train(words(alone, gpt2, text, hookpoints=[site]))
        for name in ("sae/sae.safetensors", "sae/config.json"):
            assert (out / site / name).read_bytes() == (alone / name).read_bytes()
    config = json.loads((out / sites[1] / "config.json").read_text())["config"]
    assert config["stream"]["hookpoint"] == sites[1]
    with pytest.raises(ValueError, match="already holds a sweep"):
        train(words(out, gpt2, text, hookpoints=names))
    (out / "report.html").unlink()
    assert train(["--resume", "--out", str(out), "--no-report"]).startswith(table[:40])
    assert not (out / "report.html").exists()
    with pytest.raises(ValueError, match="give nothing but --out and --report"):
        train(["--resume", "--out", str(out), "--k", "4"])
    assert train(["--resume", "--out", str(out)]).startswith(table[:40])
    assert (out / "report.html").exists()
    several = words(tmp_path / "each", gpt2, text, hookpoints=sites[:2])
    text_of_table = sweep(["topk:k=4", "topk:k=8", *several])
    assert text_of_table.count("transformer.h.2.mlp") == 2
    folders = tmp_path / "each" / "transformer.h.1-topk-k=4", out / "transformer.h.1"
    first, again = (json.loads((folder / "summary.json").read_text())["fvu"] for folder in folders)
    assert first == pytest.approx(again, rel=1e-3)  # two SAEs of a site share the encoder GEMM


@pytest.mark.parametrize(
    "more",
    [("--target", "blocks.1.hook_mlp_out"), ("--layers", "blocks.2.hook_resid_post", "*.h.3")],
)
def test_transcoders_and_crosscoders(gpt2: Path, text: Path, tmp_path: Path, more: tuple[str, ...]):
    """The same as on a harvest of the same hookpoints: inputs, targets and layers are in place."""
    out = tmp_path / "run"
    train(words(out, gpt2, text, *more, hookpoints=["transformer.h.1"]))
    sae = fastsae.load(out / "sae")
    assert (sae.d_out, sae.layers) == ((24, 1) if more[0] == "--target" else (None, 3))
    assert json.loads((out / "summary.json").read_text())["fvu"] < 0.8
    config = json.loads((out / "config.json").read_text())["config"]
    places = {"target": "transformer.h.1.mlp"} if more[0] == "--target" else {"target": None}
    places |= {"layers": ["transformer.h.2", "transformer.h.3"] if more[0] == "--layers" else []}
    assert {name: config[name] for name in places} == places
    assert train(["--resume", "--out", str(out)]).startswith("  FVU")
    with pytest.raises(ValueError, match="need one hookpoint, got 2"):
        train(words(tmp_path / "two", gpt2, text, *more, hookpoints=HOOKS))


def test_from_python(gpt2: Path, tmp_path: Path):
    """A model in memory, texts in a list, and no files."""
    model, tokenizer = load_model(str(gpt2)), load_tokenizer(str(gpt2))
    draw = random.Random(1)
    texts = [" ".join(draw.choice(WORDS) for _ in range(40)) for _ in range(50)]
    producer = ModelProducer(model, tokenizer, texts, ["transformer.h.3"], context_length=32)
    config = fastsae.train.TrainConfig(d_sae=64, steps=30, batch_size=100, out=tmp_path / "run")
    sae = fastsae.train.Trainer(config, Stream(producer, 500)).fit()
    assert sae.d_in == 24 and producer.widths == {"transformer.h.3": 24}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--hookpoint", "transformer.h.9"], "no module 'transformer.h.9'; nearest:"),
        (["--hookpoint", "transformer.x.*"], "no modules that match 'transformer.x.*'"),
        (["--text", "nowhere"], "no text found at"),
        (["--buffer-tokens", "1000000000000"], "buffer_tokens must be at most"),
        (["--layers", "transformer.h.1.mlp.c_fc"], "layers must have one width, got [24, 96]"),
        (["--data", "acts"], "give either data or a model, got both"),
        (["--steps", "none"], "steps must be given with a model"),
        (["--dtype", "float16"], "unknown option --dtype; did you mean --model-dtype?"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(
    gpt2: Path, text: Path, tmp_path: Path, more: list[str], message: str
):
    out = tmp_path / "run"
    with pytest.raises(ValueError) as error:
        train(words(out, gpt2, text, *more))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not out.exists() or not [*out.glob("[!.]*")]


def test_a_stream_needs_a_model_and_text(gpt2: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="--hookpoint needs --model, too"):
        train(["--hookpoint", "transformer.h.1", "--out", str(tmp_path / "run")])
    (tmp_path / "empty.txt").write_text("")
    empty = words(tmp_path / "run", gpt2, tmp_path / "empty.txt")
    with pytest.raises(ValueError, match="the stream has no tokens"):
        train(empty)


def test_an_interrupt_does_not_wait_for_the_buffer(gpt2: Path, text: Path, tmp_path: Path):
    """A block of a million tokens of a tiny text would take minutes; the run stops at once."""
    out = tmp_path / "run"
    command = words(out, gpt2, text, "--steps", "100000", "--batch-size", "2000")
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "fastsae", "train", *command],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stderr is not None
    while "step 5/" not in process.stderr.readline() and process.poll() is None:
        pass
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "saved; continue with --resume" in said


def test_repeated_hookpoints_are_all_taken_and_settings_of_one_sae_refused(
    gpt2: Path, text: Path, tmp_path: Path
):
    given = words(tmp_path / "run", gpt2, text, "--hookpoint", "transformer.h.2", "--steps", "3")
    assert "transformer.h.2" in train(given)
    with pytest.raises(ValueError, match="context_length cannot be set per SAE"):
        sweep(["topk:k=4", "topk:k=8,context_length=16", *words(tmp_path / "x", gpt2, text)])
    for same in (["--target", "blocks.1.hook_resid_post"], ["--layers", "transformer.h.*"]):
        with pytest.raises(ValueError, match=r"must differ, got transformer.h.1 twice"):
            train(words(tmp_path / "y", gpt2, text, *same))
    with pytest.raises(ValueError, match=r"one hookpoint, got 4 at blocks.\*.hook_mlp_out"):
        train(words(tmp_path / "z", gpt2, text, "--target", "blocks.*.hook_mlp_out"))


def test_text_without_a_row_is_refused(gpt2: Path, text: Path, tmp_path: Path):
    """All positions are first ones, and left out."""
    more = ["--drop-first", "--context-length", "1"]
    with pytest.raises(ValueError, match="the stream has no tokens"):
        train(words(tmp_path / "run", gpt2, text, *more))
    producer = load_model(str(gpt2)), load_tokenizer(str(gpt2))
    with pytest.raises(ValueError, match="readable more than once"):
        ModelProducer(*producer, iter(["a text"]), ["transformer.h.1"])


def test_null_rows_are_counted_once_and_without_held_out_rows_the_text_is_unknown(
    gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Over several passes, one of which looks for held-out rows."""
    file, out = tmp_path / "rows.jsonl", tmp_path / "run"
    rows = [None if n % 10 == 3 else "the best of times " * 9 for n in range(60)]
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    train(words(out, gpt2, file, "--heldout-fraction", "0"))
    assert "in the buffer; 6 rows without text were skipped" in capsys.readouterr().err
    assert "not run: the data's text is unknown; a stream knows" in evaluate([str(out)])
    file.write_text('{"text": null}\n' * 3)
    with pytest.raises(ValueError, match=r"the stream has no tokens \(3 rows are null\)"):
        train(words(tmp_path / "none", gpt2, file))


def test_a_run_resumes_only_on_the_same_text(gpt2: Path, text: Path, tmp_path: Path):
    out = tmp_path / "run"
    train(words(out, gpt2, text))
    assert train(["--resume", "--out", str(out)]).startswith("  FVU")
    with pytest.raises(ValueError, match="context_length = 16 differs"):
        train(["--resume", "--out", str(out), "--context-length", "16"])
    (text / "00.txt").write_text("another text")
    with pytest.raises(ValueError, match="written for other data: the text or settings of"):
        train(["--resume", "--out", str(out)])


def test_the_default_buffer_fits_the_process_with_the_least_memory():
    settings = StreamConfig(model="any", text=("any",), hookpoint=("any",))
    assert settings.fitting(row_bytes=1000, memory=4_000_000) == 2000
