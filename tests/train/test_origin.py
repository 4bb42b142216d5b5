"""Where a run's activations come from, as SAELens' metadata say it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from fastsae import TrainConfig, Trainer
from fastsae.cli import run
from fastsae.data import (
    ActivationArray,
    ActivationSource,
    HarvestConfig,
    Joined,
    StreamConfig,
    harvest_each,
)
from fastsae.nn import TopKConfig
from fastsae.train.columns import Columns
from fastsae.train.origin import origin_of, stored_local, stored_origin
from tests.evals.conftest import END, TEXTS

pytestmark = pytest.mark.usefixtures("undrawn")
HOOKS = "transformer.h.0", "transformer.h.1.ln_1"


@pytest.fixture(scope="module")
def model(gpt2, tmp_path_factory) -> Path:
    """A GPT-2 whose tokenizer has a BOS token."""
    folder = tmp_path_factory.mktemp("model") / "gpt2"
    shutil.copytree(gpt2, folder)
    AutoTokenizer.from_pretrained(gpt2, bos_token=END).save_pretrained(folder)
    return folder


@pytest.fixture
def settings(model, tmp_path) -> dict[str, Any]:
    (tmp_path / "text.txt").write_text(" ".join(TEXTS))
    return {
        "model": str(model),
        "hookpoint": HOOKS,
        "text": (str(tmp_path / "text.txt"),),
        "context_length": 16,
        "prepend_bos": "yes",
        "drop_first": True,
        "heldout_fraction": 0.0,
    }


def expected(model: Path) -> dict[str, Any]:
    return {
        "model_name": str(model),
        "model_class_name": "HookedTransformer",
        "hook_name": "blocks.0.hook_resid_post",
        "hf_hook_name": HOOKS[0],
        "prepend_bos": True,
        "context_size": 16,
        "seqpos_slice": (1, None),
    }


def columns(source: ActivationSource, **settings: Any) -> Columns:
    return Columns.of(TrainConfig(**settings), source)


def test_shards_and_streams_of_a_model_say_the_same(model, settings, tmp_path):
    shards = harvest_each(HarvestConfig(out=tmp_path / "acts", **settings), progress=False)
    _, stream = StreamConfig(buffer_tokens=64, **settings).open("cpu")
    for first in (shards[HOOKS[0]], stream.select(HOOKS[0])):
        assert origin_of(columns(first)) == expected(model)
    for second in (shards[HOOKS[1]], stream.select(HOOKS[1])):  # has no name in TransformerLens
        found = origin_of(columns(second))
        assert found.get("hook_name") == found.get("hf_hook_name") == HOOKS[1]
        assert found.get("model_class_name") == "AutoModelForCausalLM"
    for both in (Joined(*shards.values()), stream):
        out = {"hook_name_out": HOOKS[1], "hf_hook_name_out": HOOKS[1]}
        transcoder = columns(both, target=Path(HOOKS[1]))
        assert origin_of(transcoder) == expected(model) | out
        crosscoder = origin_of(columns(both, layers=(Path(HOOKS[1]),)))
        assert crosscoder.get("hf_hook_names") == HOOKS
        assert not [name for name in crosscoder if "hook_name" in name and name[-1] != "s"]


def test_a_run_keeps_it_for_its_exports(model, settings, tmp_path):
    config = HarvestConfig(out=tmp_path / "acts", **settings | {"hookpoint": HOOKS[0]})
    (shards,) = harvest_each(config, progress=False).values()
    trained = TrainConfig(out=tmp_path / "run", d_sae=48, activation=TopKConfig(k=4), steps=2)
    Trainer(replace(trained, batch_size=16, device="cpu"), shards, progress=False).fit()
    assert stored_origin(tmp_path / "run") == expected(model)
    assert stored_local(tmp_path / "run", {}) == ("model_name",)
    run(["convert", str(tmp_path / "run"), str(tmp_path / "out"), "--to", "sae_lens"])
    own = {"sae_lens_version": "6.0.0", "model_from_pretrained_kwargs": {}}
    for folder in (tmp_path / "run/sae_lens", tmp_path / "out"):
        metadata = json.loads((folder / "cfg.json").read_text())["metadata"]
        assert metadata == expected(model) | own | {"seqpos_slice": [1, None]}


def test_of_other_data_nothing_is_said(tmp_path):
    assert origin_of(columns(ActivationArray(torch.randn(50, 8)))) == {}
    assert stored_origin(tmp_path) == {}
