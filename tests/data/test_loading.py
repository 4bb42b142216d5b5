"""Which model files are loaded, with which class, and how a harvest may end early."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel, GPT2Model

from fastsae.data import ActivationShards, HarvestConfig, harvest, harvest_each
from fastsae.data.disk import RESERVE
from fastsae.data.model import ModelFiles, load_model, load_tokenizer

OWN_CODE = """
from transformers import GPT2Config, GPT2LMHeadModel

class OwnConfig(GPT2Config):
    model_type = "own"

class OwnForCausalLM(GPT2LMHeadModel):
    config_class = OwnConfig
"""


def changed(model: Path, folder: Path, **settings: Any) -> Path:
    """A copy of a model with other settings in its config."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_config_without_architectures_keeps_the_head_that_there_is(gpt2: Path, tmp_path: Path):
    whole = changed(gpt2, tmp_path / "whole", architectures=None)
    assert isinstance(load_model(str(whole)), GPT2LMHeadModel)
    untied = changed(gpt2, tmp_path / "bare", tie_word_embeddings=False)
    GPT2Model.from_pretrained(untied).save_pretrained(untied)
    bare = changed(untied, tmp_path / "headless", architectures=None)
    assert type(load_model(str(bare))) is GPT2Model


def test_a_models_own_code_runs_only_if_it_is_trusted(gpt2: Path, tmp_path: Path):
    own = changed(
        gpt2,
        tmp_path / "own",
        architectures=["OwnForCausalLM"],
        model_type="own",
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    )
    (own / "own.py").write_text(OWN_CODE)
    with pytest.raises(ValueError, match="own Python code, which only --trust-remote-code runs"):
        load_model(str(own))
    model = load_model(str(own), files=ModelFiles(trust_remote_code=True))
    assert type(model).__name__ == "OwnForCausalLM"


def test_data_cannot_ask_to_run_code(gpt2: Path):
    asked = {"revision": "main", "trust_remote_code": True}
    assert ModelFiles.of(asked) == ModelFiles(revision="main")


def test_a_missing_gguf_file_is_named(gpt2: Path):
    for load in (load_model, load_tokenizer):
        with pytest.raises(ValueError, match="cannot load .*gpt2"):
            load(str(gpt2), files=ModelFiles(gguf_file="absent.gguf"))


def settings(model: Path, tmp_path: Path, **others: Any) -> HarvestConfig:
    return HarvestConfig(
        model=str(model),
        hookpoint=("transformer.h.0", "transformer.h.1"),
        out=tmp_path / "out",
        text=(str(tmp_path / "text"),),
        context_length=16,
        heldout_fraction=0.0,
        **others,
    )


@pytest.fixture
def overflowing(gpt2: Path, tmp_path: Path) -> Path:
    """A model whose activations exceed float16 at one token, of the second of three documents."""
    (tmp_path / "text").mkdir()
    for number, text in enumerate(["was it the best " * 9, "the best~", "of times"]):
        (tmp_path / "text" / f"{number}.txt").write_text(text)
    folder = changed(gpt2, tmp_path / "overflowing")
    (token,) = load_tokenizer(str(gpt2))("~")["input_ids"]
    model = GPT2LMHeadModel.from_pretrained(folder)
    with torch.no_grad():
        model.transformer.wte.weight[token] = 1e5
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("dtypes", "cure"),
    [
        ({"dtype": "float16"}, "use --dtype bfloat16"),
        ({"model_dtype": "float16"}, "use --model-dtype bfloat16"),
        (
            {"dtype": "float16", "model_dtype": "float16"},
            "use --model-dtype bfloat16 --dtype bfloat16",
        ),
    ],
)
def test_rows_before_an_overflow_are_kept(
    overflowing: Path, tmp_path: Path, dtypes: dict[str, Any], cure: str
):
    config = settings(overflowing, tmp_path, **dtypes)
    message = f"transformer.h.0 holds NaN or Inf in document 1: float16 ends at 65504, {cure}"
    with pytest.raises(ValueError, match=f"{message}. The .* rows before are saved in .*out"):
        harvest(config, progress=False)
    kept = [ActivationShards(folder) for folder in config.folders.values()]
    assert kept[0].n_tokens == kept[1].n_tokens
    for shards in kept:
        documents = shards.contexts(torch.arange(shards.n_tokens)).documents
        assert documents.unique().tolist() == [0]
    with pytest.raises(ValueError, match="holds a harvest that ended early: transformer.h.0"):
        harvest(config, progress=False)


@pytest.mark.parametrize(
    ("own", "found"),
    [("bfloat16", "bfloat16"), ("float16", "float16"), ("float64", "float32"), (None, "float32")],
)
def test_activations_are_stored_in_the_precision_of_the_weights(
    own: str | None, found: str, gpt2: Path, tmp_path: Path
):
    """The model itself runs in float32, which shows in the last bits."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("was it the best " * 9)
    config = settings(changed(gpt2, tmp_path / "model", dtype=own), tmp_path)
    shards = harvest(config, progress=False)
    exact = harvest(replace(config, dtype="float32", out=tmp_path / "exact"), progress=False)
    rows = torch.arange(shards.n_tokens)
    assert torch.equal(shards.rows(rows), exact.rows(rows).to(getattr(torch, found)).float())
    assert shards.dtype == shards.harvest["dtype"] == found
    same = harvest(replace(config, dtype=found), progress=False)
    any_dtype = harvest(replace(config, out=tmp_path / "exact"), progress=False)
    assert (same.dtype, any_dtype.dtype) == (found, "float32"), "as they are stored"


def usage(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """A disk with this many free bytes."""
    real = shutil.disk_usage("/")
    monkeypatch.setattr("shutil.disk_usage", lambda path: real._replace(free=free))


def test_a_harvest_that_does_not_fit_is_refused_before_the_model_runs(
    gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("was it the best " * 9)
    config = settings(gpt2, tmp_path, max_tokens=10**6)
    size = 10**6 * 2 * (24 * 4 + 12)  # two hookpoints of width 24, with three labels
    usage(monkeypatch, RESERVE + size - 1)
    message = "1,000,000 tokens in float32 take about 216 MB .* has 283 MB free: lower --max-tokens"
    with pytest.raises(ValueError, match=message):
        harvest(config, progress=False)
    assert not [*tmp_path.rglob("shard-*"), *tmp_path.rglob("index.json")]
    (config.folders["transformer.h.1"] / "shard-00000.safetensors").write_bytes(b"?")
    (config.folders["transformer.h.1"] / ".unfinished").touch()
    harvest(config)  # a byte that a killed harvest left is overwritten
    assert "1,000,000 tokens in float32: about 216 MB on disk" in capsys.readouterr().err


def test_a_harvest_ends_before_the_disk_is_full(
    gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "text").mkdir()
    for number in range(6):
        (tmp_path / "text" / f"{number}.txt").write_text("was it the best " * 9)
    config = settings(gpt2, tmp_path, batch_tokens=16)
    usage(monkeypatch, RESERVE + 40_000)  # they wait in memory: nothing is written before the end
    with pytest.raises(ValueError, match="out is nearly full. The .* rows before are saved in"):
        harvest(config, progress=False)
    kept = [ActivationShards(folder) for folder in config.folders.values()]
    assert 40_000 - 80 * 216 < kept[0].n_tokens * 216 <= 40_000
    assert kept[0].n_tokens == kept[1].n_tokens
    with pytest.raises(ValueError, match="ended early: the disk of .* is nearly full"):
        harvest(config, progress=False)


def test_a_harvest_of_an_older_version_is_found(gpt2: Path, tmp_path: Path):
    """Settings that it does not know have their defaults."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("was it the best " * 9)
    config = settings(gpt2, tmp_path)
    harvest_each(config, progress=False)
    new = {"revision", "gguf_file", "tokens_column", "prepend_bos", "drop_first"}
    for folder in config.folders.values():
        index = json.loads((folder / "index.json").read_text())
        for name in new:
            del index["harvest"][name]
        for name in ("skipped_rows", "stopped"):
            del index[name]
        for name in ("median", "huge_fraction"):
            del index["norm"][name]
        (folder / "index.json").write_text(json.dumps(index))
    (found, _) = harvest_each(config, progress=False).values()
    assert (found.norm.median, found.skipped_rows) == (None, 0)
    with pytest.raises(ValueError, match="with drop_first = False instead of True"):
        harvest(settings(gpt2, tmp_path, drop_first=True), progress=False)
