"""The evaluations of SAELens and SAEBench take an export as it is, and accelerated."""

import json
import shutil
from pathlib import Path

import pytest

from bench.lens_eval import EVALUATIONS, compare, write_texts
from fastsae import TrainConfig, Trainer
from fastsae.data import HarvestConfig, harvest_each
from fastsae.nn import TopKConfig
from tests.evals.conftest import END, TEXTS
from tests.evals.conftest import gpt2 as gpt2

pytestmark = [
    pytest.mark.usefixtures("undrawn"),
    pytest.mark.filterwarnings("ignore"),  # of the libraries
]
LIBRARY = {"SAELens": "sae_lens", "SAEBench core": "sae_bench"}


@pytest.fixture(scope="module")
def exported(gpt2, tmp_path_factory) -> Path:
    """A run on a small GPT-2, and its text as a dataset."""
    from transformers import AutoTokenizer

    pytest.importorskip("sae_lens")
    folder = tmp_path_factory.mktemp("exported")
    for name in ("text", "dataset"):
        (folder / name).mkdir()
    model = folder / "model"
    shutil.copytree(gpt2, model)
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"n_ctx": 64}))  # as GPT-2's own has
    AutoTokenizer.from_pretrained(gpt2, bos_token=END).save_pretrained(model)
    (folder / "text" / "a.txt").write_text(" ".join(TEXTS * 8).replace(END, ""))
    config = HarvestConfig(
        model=str(model),
        hookpoint="blocks.0.hook_resid_post",
        text=(str(folder / "text"),),
        out=folder / "acts",
        context_length=16,
        prepend_bos="yes",
    )
    (shards,) = harvest_each(config, progress=False).values()
    activation = TopKConfig(k=4)
    config = TrainConfig(out=folder / "run", d_sae=48, activation=activation, steps=60)
    Trainer(config, shards, progress=False).fit()
    write_texts((str(folder / "text"),), folder / "dataset")
    return folder


@pytest.mark.parametrize("name", EVALUATIONS)
def test_numbers_are_the_same_before_and_after_accelerate(name, exported):
    pytest.importorskip(LIBRARY[name])
    found = compare(EVALUATIONS[name], exported / "run", exported / "dataset", 2)
    assert found["exported"]["l0"] == pytest.approx(4.0, abs=0.2)
    assert 0 < found["exported"]["explained_variance"] < 1
    assert found["largest relative difference"] < 1e-3, found["of"]
