"""The report as a file: of every kind of SAE, complete, the same for the same seed, and escaped."""

import base64
import gzip
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fastsae.cli import run
from fastsae.data import ActivationArray, Contexts, Joined
from fastsae.interop import load, save
from fastsae.report import ReportConfig, Subject, write_comparison, write_report
from fastsae.report.cards import NEIGHBOR_TOKENS
from fastsae.report.report import names_of
from fastsae.report.subject import published_text
from fastsae.report.text import visible

from .conftest import HOSTILE, VOCABULARY
from .kinds import D_IN, D_OUT, KINDS, build

SMALL = ["--d-sae", "64", "--k", "4", "--batch-size", "128", "--lr", "0.003", "--steps", "20"]


def data_of(page: str) -> dict:
    packed = re.search(r'id="data">([A-Za-z0-9+/=]+)</script>', page)
    assert packed
    return json.loads(gzip.decompress(base64.b64decode(packed[1])))


def rows(width: int) -> ActivationArray:
    places = torch.arange(300)
    return ActivationArray(torch.randn(300, width), Contexts(places % 7, places % 30, places // 30))


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_sae_has_a_report(name, tmp_path):
    sae = build(name)
    data = Joined(rows(D_IN), rows(D_OUT)) if sae.d_out else rows(D_IN)
    if sae.layers > 1:
        data = Joined(rows(D_IN // 2), rows(D_IN // 2))
    write_report(sae, data, ReportConfig(latents=9), tmp_path / "report.html", progress=False)
    page = (tmp_path / "report.html").read_text()
    found = data_of(page)
    assert 0 < len(found["latents"]) <= 9
    assert found["signed"] == any("low" in card for card in found["latents"])
    cards = {card["id"]: card for card in found["latents"]}
    for card in cards.values():
        assert any(tokens for _, _, tokens in card["near"])
        for near, _, tokens in card["near"]:
            if near in cards:
                assert tokens == [token for token, *_ in cards[near]["tokens"][:NEIGHBOR_TOKENS]]
        assert ("cosine" in card) == (sae.d_out is None)
        assert len(card.get("norms", [])) == (sae.layers if sae.layers > 1 else 0)
        assert card["tokens"] and card["top" if "top" in card else "low"]
    assert "Tokens are shown by their numbers" in page
    assert "No logit lens: the data names no model." in page


def test_the_same_seed_gives_the_same_bytes(world, tmp_path):
    pages = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        out, config = tmp_path / name / "report.html", ReportConfig(latents=12, seed=seed)
        write_report(world.sae, world.heldout, config, out, progress=False)
        pages.append(out.read_bytes())
    assert pages[0] == pages[1] != pages[2]


def test_paths_of_this_machine_are_shortened(tmp_path):
    assert published_text("cannot load '/no/such dir/model' as", "/no/such dir/model") == (
        "cannot load 'model' as"
    )
    kept = "see https://host/a/b, owner/name, 1/2 or runs/a"
    assert published_text(f"{kept}: /a/b/c.json: no", None) == f"{kept}: c.json: no"
    runs = [tmp_path / name / "run" for name in "ab"]
    assert names_of(runs) == ["a/run", "b/run"] and names_of(runs[:1]) == ["run"]
    assert names_of([runs[0], runs[0]]) == ["run", "run"] and names_of([]) == []


def test_the_page_is_complete_and_runs_nothing_but_its_own_script(world, tmp_path):
    out = tmp_path / "report.html"
    subject = Subject(title="</title><script>window.hacked=5</script>\u202e")
    write_report(world.sae, world.heldout, ReportConfig(), out, subject, progress=False)
    page = out.read_text()
    policy = re.search(r'Security-Policy" content="(.*?)"', page)
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)
    assert policy and script
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"default-src 'none'; script-src 'sha256-{digest}'" in policy[1]
    assert re.findall(r"<script[^>]*>", page) == [
        '<script type="application/octet-stream" id="data">',
        "<script>",
    ]
    assert "\\u202e" in page and "\u202e" not in page
    markup = page.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|innerHTML|insertAdjacent|document\.write|\ssrc=", markup)
    strings = data_of(page)["strings"]
    assert {visible(text).strip() for text in HOSTILE} <= {text.strip() for text in strings}
    assert all(text.isprintable() for text in strings)


def test_a_latent_of_a_token_is_shown_on_it(world, tmp_path):
    """Every latent of this SAE is the direction of a token."""
    out = tmp_path / "report.html"
    write_report(world.sae, world.heldout, ReportConfig(), out, progress=False)
    found = data_of(out.read_text())
    for card in found["latents"]:
        if card["id"] < len(VOCABULARY):
            wanted = visible(VOCABULARY[card["id"]])
            number, share, of = card["tokens"][0]
            assert found["strings"][number].strip() == wanted.strip()
            assert share > 0.5 and of > 0.9


def test_training_leaves_a_report(world, tmp_path, capsys):
    out = tmp_path / "run"
    run(["train", "--data", str(world.data), "--out", str(out), "--eval-every", "10", *SMALL])
    assert f"report   {out / 'report.html'}" in capsys.readouterr().out
    page = (out / "report.html").read_text()
    found = data_of(page)
    assert found["curves"][0]["training"]["fvu"]["x"][-1] == 20
    assert found["curves"][0]["heldout"]["fvu"]["x"] == [10, 20]
    assert "not measured" in page and "`fastsae report RUN` adds it" in page
    assert all("promoted" not in card for card in found["latents"])
    run(["report", str(out), "--no-lens"])
    assert (out / "report.html").read_text() == page, "the command writes what training does"
    run(["eval", str(out), "--windows", "4"])
    run(
        [
            "report",
            str(out),
            "--out",
            str(tmp_path / "new.html"),
            "--latents",
            "3",
            "--include",
            "9",
            "--neuronpedia",
            str(tmp_path / "dashboards"),
        ]
    )
    assert f"{tmp_path / 'dashboards'}: dashboards for Neuronpedia" in capsys.readouterr().out
    page, found = (text := (tmp_path / "new.html").read_text()), data_of(text)
    batch = json.loads((tmp_path / "dashboards" / "batch-0.json").read_text())
    numbers = [feature["feature_index"] for feature in batch["features"]]
    assert numbers == [card["id"] for card in found["latents"]]
    assert "not measured" not in page and "CE recovered" in page
    assert str(tmp_path) not in page and str(world.data.parent) not in page
    assert str(world.model.parent) not in page
    assert "promoted" in found["latents"][0]
    assert 9 in [card["id"] for card in found["latents"]] and len(found["latents"]) <= 4
    second = tmp_path / "second"
    run(["train", "--data", str(world.data), "--out", str(second), "--no-report", *SMALL])
    assert "none yet: fastsae report" in capsys.readouterr().out
    assert not (second / "report.html").exists()
    run(["report", str(out), "--compare", str(second), "--no-lens"])
    found = data_of((out / "report.html").read_text())
    assert [one["name"] for one in found["curves"]] == ["run", "second"]
    assert all("promoted" not in card for card in found["latents"])


def test_a_report_that_fails_leaves_the_run(world, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("no\nreason")

    monkeypatch.setattr("fastsae.cli.finished.write_report", fail)
    out = tmp_path / "run"
    run(["train", "--data", str(world.data), "--out", str(out), *SMALL])
    printed = capsys.readouterr()
    assert f"no report (RuntimeError: no reason); to write it, run: fastsae report {out}" in (
        printed.err
    )
    assert "FVU" in printed.out and load(out).d_sae == 64


def test_an_sae_of_another_library(world, tmp_path, capsys):
    np.save(tmp_path / "acts.npy", world.heldout.rows(torch.arange(500)).numpy())
    save(world.sae, tmp_path / "lens", "sae_lens")
    run(["report", str(tmp_path / "lens"), "--data", str(tmp_path / "acts.npy")])
    assert f"written to {tmp_path / 'lens' / 'report.html'}" in capsys.readouterr().out
    page = (tmp_path / "lens" / "report.html").read_text()
    assert "No contexts: the text of these activations is unknown." in page
    assert "training data" not in page
    assert data_of(page)["curves"] == [{"name": "lens"}]


@pytest.fixture(scope="module")
def sweep(world, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sweep") / "sweep"
    shared = ["--data", str(world.data), "--out", str(out), *SMALL]
    run(["sweep", "topk", "abstopk", "relu:target_l0=4", *shared])
    return out


def test_a_sweep_has_a_page_that_compares(sweep):
    runs = data_of((sweep / "report.html").read_text())["runs"]
    found = json.loads((sweep / "comparison.json").read_text())
    assert {one["name"]: one["fvu"] for one in runs} == {n: r["fvu"] for n, r in found.items()}
    assert not any(one["report"] for one in runs)
    run(["report", str(sweep / "topk")])
    run(["report", str(sweep)])
    runs = data_of((sweep / "report.html").read_text())["runs"]
    assert {one["report"] for one in runs} == {"topk/report.html", None}
    write_comparison(sweep, sweep.parent / "else where" / "page.html")
    runs = data_of((sweep.parent / "else where" / "page.html").read_text())["runs"]
    assert {one["report"] for one in runs} == {"../sweep/topk/report.html", None}
    assert all(one["training"]["fvu"]["x"][-1] == 20 for one in runs)


def test_what_cannot_be_reported(world, sweep, tmp_path):
    world.sae.save(tmp_path / "sae")
    data = ["--data", str(world.data)]
    np.save(tmp_path / "wide.npy", np.zeros((20, 7), "f4"))
    for words, message in (
        ([str(tmp_path / "sae")], "say which --data"),
        ([str(tmp_path / "none"), *data], "say where by --out"),
        ([str(tmp_path / "none"), *data, "--out", str(tmp_path / "x.html")], "cannot|no SAE|not"),
        ([str(tmp_path / "sae"), *data, "--out", str(tmp_path)], "is a directory"),
        ([str(tmp_path / "sae"), *data, "--include", "40"], "must be from 0 to 39, got 40"),
        ([str(tmp_path / "sae"), *data, "--latents", "0"], "latents must be at least 1, got 0"),
        ([str(tmp_path / "sae"), *data, "--projection", "tsne"], "pca"),
        ([str(tmp_path / "sae"), *data, "--compare", str(tmp_path)], "no metrics.jsonl"),
        ([str(tmp_path / "sae"), "--data", str(tmp_path / "wide.npy")], "d_in = 32"),
        ([str(sweep), "--latents", "5"], "--latents has no effect on the page of a sweep"),
    ):
        with pytest.raises(ValueError, match=message):
            run(["report", *words])
    with pytest.raises(ValueError, match="holds no sweep"):
        write_comparison(tmp_path / "sae", tmp_path / "x.html")
    (sweep / "comparison.json").rename(tmp_path / "comparison.json")
    with pytest.raises(ValueError, match="has not ended"):
        run(["report", str(sweep)])
    (tmp_path / "comparison.json").rename(sweep / "comparison.json")
