"""Harvested rows against the model's own hidden states, and everything that can go wrong."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from fastsae.data import (
    ActivationShards,
    HarvestConfig,
    Joined,
    harvest,
    harvest_each,
)
from fastsae.data.model import load_model, load_tokenizer

WORDS = ("the", "best", "of", "times", "was", "it", "def", "return", "x", "+", "1", "while")


def story(seed: int, words: int) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(words)) + "\n"


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Thirty documents of different lengths, in a folder."""
    (tmp_path / "text").mkdir()
    texts = [story(n, 5 + 7 * n) for n in range(30)]
    for n, text in enumerate(texts):
        (tmp_path / "text" / f"{n:02d}.txt").write_text(text)
    return texts


def config(tmp_path: Path, folder: Path, **changes: Any) -> HarvestConfig:
    hookpoint = "transformer.h.1" if "gpt2" in folder.name else "encoder.layer.1"
    settings: dict[str, Any] = {
        "model": str(folder),
        "hookpoint": hookpoint,
        "out": tmp_path / "out",
        "text": (str(tmp_path / "text"),),
        "context_length": 32,
        "batch_tokens": 256,
        "heldout_fraction": 0.2,
    }
    return HarvestConfig(**{**settings, **changes})


def every(shards: ActivationShards) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    rows = torch.arange(shards.n_tokens)
    return shards.rows(rows), shards.contexts(rows)._asdict()


def windows_of(labels: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Row numbers, window by window: a window begins where positions do not continue."""
    places, documents = labels["positions"], labels["documents"]
    goes_on = (places[1:] == places[:-1] + 1) & (documents[1:] == documents[:-1])
    starts = [0, *((~goes_on).nonzero().flatten() + 1).tolist(), len(places)]
    return [torch.arange(a, b) for a, b in zip(starts, starts[1:], strict=False)]


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_rows_are_the_models_hidden_states(
    name: str, texts: list[str], tmp_path: Path, request: pytest.FixtureRequest
):
    folder = request.getfixturevalue(name)
    shards = harvest(config(tmp_path, folder, max_tokens=900), progress=False)
    x, labels = every(shards)
    exact, plain = load_model(str(folder)).double(), load_model(str(folder))
    ours = theirs = 0.0
    for window in windows_of(labels):
        ids, places = labels["token_ids"][window], labels["positions"][window]
        if name == "bert":  # [CLS] before, [SEP] after
            ids = torch.cat([torch.tensor([1]), ids, torch.tensor([2])])
        with torch.no_grad():
            want = exact(ids[None], output_hidden_states=True).hidden_states[2][0, places]
            alone = plain(ids[None], output_hidden_states=True).hidden_states[2][0, places]
        ours = max(ours, float((x[window] - want).abs().max()))
        theirs = max(theirs, float((alone - want).abs().max()))
    assert ours <= 2 * theirs
    assert (shards.model, shards.hookpoint, shards.d_in) == (
        str(folder),
        "transformer.h.1" if name == "gpt2" else "encoder.layer.1",
        24,
    )


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_token_ids_recover_every_document_on_one_side_only(
    name: str, texts: list[str], tmp_path: Path, request: pytest.FixtureRequest
):
    folder = request.getfixturevalue(name)
    shards = harvest(config(tmp_path, folder), progress=False)
    assert shards.heldout is not None
    tokenizer = load_tokenizer(str(folder))
    found: dict[int, str] = {}
    for side in (shards, shards.heldout):
        _, labels = every(side)
        assert not set(labels["token_ids"].tolist()) & set(tokenizer.all_special_ids)
        assert labels["positions"].max() < 32
        assert labels["positions"].min() == (1 if name == "bert" else 0)
        for document in labels["documents"].unique().tolist():
            assert document not in found
            tokens = labels["token_ids"][labels["documents"] == document]
            found[document] = str(tokenizer.decode(tokens.tolist()))
    assert [found[n] for n in range(30)] == texts
    assert 1 <= len(every(shards.heldout)[1]["documents"].unique()) <= 14


def test_a_long_document_is_held_out_in_parts(gpt2: Path, tmp_path: Path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "one.txt").write_text(story(0, 3000))
    settings = config(tmp_path, gpt2, context_length=4, heldout_fraction=0.4)
    shards = harvest(settings, progress=False)
    assert shards.heldout is not None
    tokens = shards.n_tokens + shards.heldout.n_tokens
    whole = harvest(
        config(tmp_path, gpt2, heldout_fraction=0.0, out=tmp_path / "whole"), progress=False
    )
    assert whole.heldout is None and whole.n_tokens == tokens


def test_budgets(texts: list[str], gpt2: Path, tmp_path: Path):
    few = harvest(config(tmp_path, gpt2, max_tokens=500), progress=False)
    assert 500 <= few.n_tokens < 500 + 32
    heads = harvest(
        config(tmp_path, gpt2, max_document_tokens=10, out=tmp_path / "heads"), progress=False
    )
    assert every(heads)[1]["documents"].bincount().max() == 10


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_on_disk(texts: list[str], gpt2: Path, tmp_path: Path, dtype: str):
    full = harvest(config(tmp_path, gpt2), progress=False)
    half = harvest(config(tmp_path, gpt2, dtype=dtype, out=tmp_path / dtype), progress=False)
    assert half.dtype == dtype
    assert torch.equal(every(half)[0], every(full)[0].to(getattr(torch, dtype)).float())


def test_the_same_harvest_is_found_and_another_is_refused(
    texts: list[str], gpt2: Path, tmp_path: Path
):
    settings = config(tmp_path, gpt2)
    first = harvest(settings, progress=False)
    written = {p: p.stat().st_mtime_ns for p in settings.out.rglob("*")}
    again = harvest(settings, progress=False)
    assert again.fingerprint == first.fingerprint
    assert {p: p.stat().st_mtime_ns for p in settings.out.rglob("*")} == written
    with pytest.raises(ValueError, match="'transformer.h.1' instead of 'transformer.h.2'"):
        harvest(config(tmp_path, gpt2, hookpoint="transformer.h.2"), progress=False)
    (tmp_path / "text" / "30.txt").write_text("more")
    with pytest.raises(ValueError, match="already holds other activations, with files ="):
        harvest(settings, progress=False)
    elsewhere = config(tmp_path, gpt2, out=tmp_path / "new")
    copy = config(tmp_path, gpt2, out=tmp_path / "copy")
    same = [harvest(c, progress=False).fingerprint for c in (elsewhere, copy)]
    assert same[0] == same[1] != first.fingerprint


def test_several_hookpoints_in_one_pass_are_each_what_it_is_alone(
    texts: list[str], gpt2: Path, tmp_path: Path
):
    names = ("transformer.h.1.mlp:in", "transformer.h.1.mlp", "transformer.h.2.mlp.c_proj:in")
    alone = {
        name: harvest(config(tmp_path, gpt2, hookpoint=name, out=tmp_path / name), progress=False)
        for name in names
    }
    settings = config(tmp_path, gpt2, hookpoint=names, dtype="float32")
    assert harvest(settings, progress=False).path == settings.out / names[0]
    written = {p: p.stat().st_mtime_ns for p in settings.out.rglob("*")}
    found = harvest_each(settings, progress=False)
    assert {p: p.stat().st_mtime_ns for p in settings.out.rglob("*")} == written
    assert list(found) == list(names)
    for name, shards in found.items():
        assert shards.path == settings.out / name and shards.hookpoint == name
        assert shards.fingerprint == alone[name].fingerprint
        assert shards.heldout is not None and (same := alone[name].heldout) is not None
        assert torch.equal(every(shards.heldout)[0], every(same)[0])
    assert [shards.d_in for shards in found.values()] == [24, 24, 96]
    assert Joined(*found.values()).d_in == 144


def test_a_hookpoint_can_be_added_to_a_harvest(texts: list[str], gpt2: Path, tmp_path: Path):
    names = ("transformer.h.0", "transformer.h.1", "transformer.h.2")
    few = harvest_each(config(tmp_path, gpt2, hookpoint=names[:2]), progress=False)
    written = {p: p.stat().st_mtime_ns for s in few.values() for p in s.path.rglob("*")}
    more = harvest_each(config(tmp_path, gpt2, hookpoint=names), progress=False)
    assert {p: p.stat().st_mtime_ns for p in written} == written
    Joined(*more.values())
    with pytest.raises(ValueError, match="out/transformer.h.1 already holds other activations"):
        harvest_each(config(tmp_path, gpt2, hookpoint=names[1:], context_length=16), progress=False)
    one = harvest(config(tmp_path, gpt2, hookpoint=names[:1], out=tmp_path / "o"), progress=False)
    assert one.path == tmp_path / "o" and one.fingerprint == few[names[0]].fingerprint


KILLED = """
import sys
from pathlib import Path
from fastsae.data import HarvestConfig, harvest
model, text, out = sys.argv[1:]
harvest(HarvestConfig(model=model, hookpoint="transformer.h.1", text=(text,), out=Path(out),
    context_length=32, batch_tokens=256, heldout_fraction=0.2), progress=False)
"""


def test_a_killed_harvest_leaves_no_index_and_starts_over(gpt2: Path, tmp_path: Path):
    (tmp_path / "text").mkdir()
    for n in range(400):
        (tmp_path / "text" / f"{n:03d}.txt").write_text(story(n, 1000))
    out = tmp_path / "out"
    run = [sys.executable, "-c", KILLED, str(gpt2), str(tmp_path / "text"), str(out)]
    process = subprocess.Popen(run)
    while not out.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "index.json").exists()
    with pytest.raises(ValueError, match="neither an index.json"):
        ActivationShards(out)
    for path in sorted((tmp_path / "text").iterdir())[1:]:  # the rest takes too long for a test
        path.unlink()
    clean = harvest(config(tmp_path, gpt2, out=tmp_path / "clean"), progress=False)
    assert harvest(config(tmp_path, gpt2), progress=False).fingerprint == clean.fingerprint


def test_json_lines_globs_and_data_sets_hold_the_same_documents(
    texts: list[str], gpt2: Path, tmp_path: Path
):
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (tmp_path / "lines.jsonl").write_text("".join(lines))
    datasets.Dataset.from_dict({"body": texts}).save_to_disk(str(tmp_path / "saved"))
    ways: list[dict[str, Any]] = [
        {},
        {"text": (str(tmp_path / "lines.jsonl"),)},
        {"text": (str(tmp_path / "text" / "0*"), str(tmp_path / "text" / "[12]*"))},
        {"text": (), "dataset": str(tmp_path / "saved"), "text_column": "body"},
    ]
    rows = []
    for n, way in enumerate(ways):
        shards = harvest(config(tmp_path, gpt2, out=tmp_path / f"{n}", **way), progress=False)
        rows.append(every(shards)[0])
    assert all(torch.equal(row, rows[0]) for row in rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": ()}, "either text or dataset"),
        ({"dataset": "x"}, "either text or dataset"),
        ({"dataset_split": "test"}, "dataset_config and dataset_split need a dataset"),
        ({"text_column": "body"}, "column 'body' needs a dataset or .jsonl files, got .*a.txt"),
        ({"context_length": 0}, "context_length must be at least 1, got 0"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"batch_tokens": 31}, "batch_tokens must be at least context_length = 32, got 31"),
        ({"heldout_fraction": 1.0}, "heldout_fraction must be at least 0 and below 1, got 1.0"),
        ({"hookpoint": ()}, r"one or more distinct module paths, got \(\)"),
        ({"hookpoint": ("a", "a")}, r"one or more distinct module paths, got \('a', 'a'\)"),
        ({"hookpoint": ("a", "../b")}, "one or more distinct module paths, got .*b"),
        ({"hookpoint": ("transformer.h.1", "x")}, "no module 'x'; nearest: "),
        ({"hookpoint": "transformer.h.7"}, "no module 'transformer.h.7'; nearest: .*h.3"),
        ({"context_length": 65}, "context_length must be at most 64, got 65"),
        ({"model": "/absent"}, "cannot load '/absent'"),
        ({"text": ("/absent",)}, "no text found at '/absent'"),
        ({"text": ("{}/bad.jsonl",)}, r'bad.jsonl line 2: expected an object with a "text"'),
        ({"text": ("{}/blank.txt",)}, "the text has no tokens"),
        ({"text": (), "dataset": "{}/absent"}, "cannot load split 'train' of dataset"),
        ({"text": (), "dataset": "{}/saved"}, "no column 'text', only body"),
    ],
)
def test_mistakes_are_named(gpt2: Path, tmp_path: Path, changes: dict[str, Any], message: str):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("best of times")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    (tmp_path / "blank.txt").write_text("")
    datasets.Dataset.from_dict({"body": ["a"]}).save_to_disk(str(tmp_path / "saved"))
    for name in ("text", "dataset"):
        if value := changes.get(name):
            here = str(tmp_path)
            changes = changes | {
                name: value.format(here)
                if isinstance(value, str)
                else tuple(part.format(here) for part in value)
            }
    with pytest.raises(ValueError, match=message) as error:
        harvest(config(tmp_path, gpt2, **changes), progress=False)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / "index.json").exists()
