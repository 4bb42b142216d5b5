"""One value with everything in it, as JSON and as a table, for each kind of model and for none."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastsae.config import from_dict, to_dict
from fastsae.data import ActivationShards, Joined
from fastsae.evals import EvalConfig, evaluate, evaluation_table
from fastsae.nn import SAE, TopK, init_from_data


@pytest.mark.parametrize(
    "fixture, line",
    [("gpt2_data", "  cross-entropy "), ("bert_data", "  embeddings ")],
)
def test_model_data(fixture, line, request):
    data = request.getfixturevalue(fixture)
    sae = init_from_data(SAE(16, 64, TopK(3)), data.sample(100))
    config = EvalConfig(windows=3, batch_windows=2, max_tokens=50, batch_size=20)
    result = evaluate(sae, data, config, progress=False)
    assert result.reconstruction.tokens == 50
    assert result.downstream is not None and result.downstream.windows == 3
    values = to_dict(result)
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    table = evaluation_table(result)
    assert line in table and max(map(len, table.splitlines())) < 90
    assert len({row.index(value) + len(value) for row, value in _values(table)}) == 1, table


def _values(table: str) -> list[tuple[str, str]]:
    """Each row of the table, and its value: what stands before the last gap."""
    return [(row, row[: row.rindex("  ")].split()[-1]) for row in table.splitlines()]


def test_no_model(tmp_path, gpt2_data):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(60, 16)).astype(np.float32))
    result = evaluate(SAE(16, 64, TopK(3)), ActivationShards(tmp_path / "x.npy"), EvalConfig())
    assert result.downstream is None
    assert "not run: the data has no model" in evaluation_table(result)
    skipped = evaluate(SAE(16, 64, TopK(3)), gpt2_data, EvalConfig(windows=0))
    assert (skipped.downstream, skipped.not_run) == (None, "windows is 0")
    several = evaluate(SAE(32, 64, TopK(3)), Joined(gpt2_data, gpt2_data), EvalConfig())
    assert several.not_run == "the data is not from a single hookpoint"


def test_nothing_recovered_from_a_harmless_ablation(bert_data):
    result = evaluate(SAE(16, 64, TopK(3)), bert_data, EvalConfig(windows=1), progress=False)
    assert result.downstream is not None
    result = replace(result, downstream=replace(result.downstream, recovered_mean=None))
    assert evaluation_table(result).endswith(" -  of the damage of mean ablation")


def test_config_round_trip():
    config = EvalConfig(max_tokens=7, windows=0)
    assert from_dict(EvalConfig, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize("name", ["max_tokens", "batch_size", "batch_windows"])
def test_bad_counts(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        EvalConfig(**{name: 0})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="windows must be at least 0, got -1"):
        EvalConfig(windows=-1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(gpt2_data):
    with pytest.raises(ValueError, match="no CUDA GPU"):
        evaluate(SAE(16, 64, TopK(3)), gpt2_data, EvalConfig(device="cuda"))
