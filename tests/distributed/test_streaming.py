"""Activations straight from a model whose work the processes of a mesh divide."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsae.data import ModelProducer, Stream
from fastsae.distributed import Mesh
from fastsae.shards import ONE_PROCESS, Shards
from fastsae.train import Sweep, TrainConfig, Trainer
from tests.distributed.processes import as_started
from tests.distributed.rounding import results
from tests.distributed.test_trainer import config
from tests.evals.conftest import gpt2 as gpt2

WORDS = [*"abcdefghijklmnopqrs"]
TEXTS = [
    " ".join(WORDS[(7 * i + j * j) % len(WORDS)] for j in range(5 + i % 23)) for i in range(90)
]
STREAM = {"eval_every": 4, "batch_size": 48, "steps": 12, "dead_after": 96}


def stream(folder: Path) -> Stream:
    """Groups are of few windows, so that blocks begin, end and begin again while training runs."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    hookpoint = ["transformer.h.0"]
    producer = ModelProducer(
        model, tokenizer, TEXTS, hookpoint, context_length=24, batch_tokens=48, heldout_fraction=0.2
    )
    return Stream(producer, 600)


def fit(shards: Shards, config: TrainConfig, folder: Path, resume: bool = False) -> float:
    """Windows that this process ran the model on, as a share of all."""
    source = stream(folder)
    ran = [0]
    assert isinstance(source.producer, ModelProducer)
    source.producer.model.register_forward_pre_hook(
        lambda module, arguments, named: ran.append(len(named["input_ids"])), with_kwargs=True
    )
    Trainer(config, source, progress=False, shards=shards).fit(resume)
    return sum(ran)


def first_batches(mesh: Mesh, folder: Path) -> tuple[torch.Tensor, list[int]]:
    source = stream(folder)
    source.divide(mesh)
    source.sample(100)
    with source.batches(32, seed=3) as batches:
        taken = [next(batches) for _ in range(40)]
    if mesh.rank == 0:  # alone from here on
        source.divide(ONE_PROCESS)
        source.sample(100)
    return torch.cat([b.x for b in taken]), [int(row) for b in taken for row in b.rows]


def test_every_process_gets_the_batches_of_one(processes, gpt2):
    with stream(gpt2).batches(32, seed=3) as batches:
        expected = [next(batches) for _ in range(40)]
    rows = [int(row) for batch in expected for row in batch.rows]
    for x, found in processes.run((1, 3), first_batches, gpt2):
        assert found == rows
        # A model's products may be rounded otherwise for other windows beside one.
        torch.testing.assert_close(x, torch.cat([b.x for b in expected]), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def alone(gpt2, tmp_path_factory) -> tuple[Path, float]:
    """A run of one process, and the windows that it ran the model on."""
    out = tmp_path_factory.mktemp("stream") / "one"
    return out, fit(ONE_PROCESS, config(None, out, **STREAM), gpt2)


def assert_close(found: Path, expected: Path) -> None:
    (weights, lines), (others, other_lines) = results(expected), results(found)
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=1e-3, atol=1e-4, msg=name)
    for line, other in zip(lines, other_lines, strict=True):
        assert other["fvu"] == pytest.approx(line["fvu"], rel=1e-3)


@pytest.mark.parametrize("axes", [(2, 2)], ids=str)
def test_a_streamed_run_of_a_mesh_is_that_of_one_process(processes, alone, gpt2, tmp_path, axes):
    shares = processes.run(axes, fit, config(None, tmp_path / "many", **STREAM), gpt2)
    assert_close(tmp_path / "many", alone[0])
    assert max(shares) < 0.5 * alone[1], "the model's work is divided"


def sweep(shards: Shards, axes: tuple[int, int], out: Path, folder: Path) -> list[str]:
    """The SAEs of a sweep that this process trains, with others on a mesh of these axes."""
    configs = {f"k{k}": config(None, out, **STREAM, k=k) for k in (2, 4, 3)}
    source, group = stream(folder), shards.part(*axes)
    return [*Sweep(configs, source, out, False, shards, group).fit()]


@pytest.mark.parametrize("axes", [(1, 1), (1, 2)], ids=str)
def test_each_group_of_a_sweep_makes_the_stream_for_itself(processes, alone, gpt2, tmp_path, axes):
    trained = processes.run((2, axes[1]), sweep, axes, tmp_path / "sweep", gpt2)
    assert trained[0] == ["k2", "k3"] and trained[-1] == ["k4"]
    assert_close(tmp_path / "sweep" / "k4", alone[0])
    if axes == (1, 1):
        one, other = (results(out)[0] for out in (tmp_path / "sweep" / "k4", alone[0]))
        assert all(torch.equal(weight, other[name]) for name, weight in one.items())


def test_the_command_shares_out_the_saes_of_a_stream(processes, gpt2, tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(TEXTS))
    options = ["--hookpoint=transformer.h.[01]", "--context-length=24", "--buffer-tokens=400"]
    options += ["--d-sae=32", "--batch-size=48", "--steps=4", f"--text={tmp_path / 'text.txt'}"]
    out = tmp_path / "sweep"
    texts = as_started(processes, 2, "sweep", "topk:k=4", "--model", gpt2, *options, "--out", out)
    assert not texts[1]
    for name in ("transformer.h.0-topk-k=4", "transformer.h.1-topk-k=4"):
        assert name in texts[0] and (out / name / "sae" / "sae.safetensors").exists()


def breaks(shards: Shards, config: TrainConfig, folder: Path) -> tuple[str, str]:
    """The errors of a run in which the model fails in one process, in the thread that loads, and
    of one whose text cannot be read there, as held-out rows are made."""
    source, calls = stream(folder), []

    def fail(module: Any, arguments: Any, named: Any) -> None:
        calls.append(0)
        if shards.rank == 1 and len(calls) > 60:
            raise ValueError("a broken model")

    assert isinstance(source.producer, ModelProducer)
    source.producer.model.register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(ValueError) as failure:
        Trainer(config, source, progress=False, shards=shards).fit()
    source = stream(folder)
    assert isinstance(source.producer, ModelProducer)
    if shards.rank == 1:

        def lost(start: int) -> Any:
            yield from list(enumerate(TEXTS))[start:12]
            raise OSError("a lost disk")

        source.producer._documents = lost
    with pytest.raises(OSError if shards.rank == 1 else ValueError) as unread:
        Sweep({"a": replace(config, eval_every=4)}, source, config.out, False, shards, shards)
    return str(failure.value), str(unread.value)


def test_a_model_or_text_that_fails_in_one_process_ends_all(processes, gpt2, tmp_path):
    run = config(None, tmp_path / "run", **STREAM | {"steps": 200, "eval_every": None})
    texts = processes.run((1, 2), breaks, run, gpt2)
    assert "could not make activations: a broken model" in texts[0][0]
    assert texts[1][0].endswith("a broken model")
    assert [text for _, text in texts] == [
        "another process could not make activations: a lost disk",
        "a lost disk",
    ]
