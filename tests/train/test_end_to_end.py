"""Training on the model's predictions: exact gradients, the same bits every time, a lower KL."""

import json
import random
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from fastsae.cli.eval import main as evaluate
from fastsae.cli.train import main as train
from fastsae.data import ActivationShards, ModelProducer, Stream
from fastsae.data.model import load_model, load_tokenizer
from fastsae.data.ordinary import Ordinary
from fastsae.nn import SAE, TopK
from fastsae.train import TrainConfig, Trainer
from fastsae.train.end_to_end import EndToEnd
from fastsae.train.standardization import Standardization
from tests.evals.conftest import TEXTS

from .conftest import Stop

pytestmark = pytest.mark.usefixtures("undrawn")
HOOKS = HOOK, _ = "transformer.h.0", "transformer.h.1"
WEIGHTS = "sae/sae.safetensors"
TERM = "--downstream", "kl", "--downstream-windows", "3"


def producer_of(gpt2: Path, hookpoint: str = HOOK) -> ModelProducer:
    model, tokenizer = load_model(str(gpt2)), load_tokenizer(str(gpt2))
    return ModelProducer(model, tokenizer, TEXTS, [hookpoint], context_length=32, batch_tokens=64)


def end_to_end(producer: ModelProducer, kind: Any = "kl") -> EndToEnd:
    config = TrainConfig(downstream=kind, downstream_windows=9, steps=1)
    found = EndToEnd.of(config, Stream(producer))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty documents of different lengths."""
    folder, draw = tmp_path_factory.mktemp("text"), random.Random(0)
    for n in range(20):
        words = draw.choices(TEXTS[0].split(), k=20 + 6 * n)
        (folder / f"{n:02d}.txt").write_text(" ".join(words))
    return folder


@pytest.fixture(scope="module")
def whole(gpt2: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the term."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(words(out, gpt2, text, *TERM))
    return out


def words(out: Path, gpt2: Path, text: Path, *more: str) -> list[str]:
    source = ["--model", str(gpt2), "--hookpoint", HOOK, "--text", str(text)]
    source += ["--context-length", "32", "--batch-tokens", "128", "--buffer-tokens", "800"]
    run = "--steps 10 --batch-size 100 --d-sae 32 --k 2 --log-every 5 --checkpoint-every 4"
    return [*source, *run.split(), "--heldout-fraction", "0.3", "--out", str(out), *more]


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["kl", "ce"])
def test_gradients_are_those_of_a_dense_float64_computation(gpt2: Path, kind: str):
    """Window by window, without padding; some tokens are special, some too far from the mean."""
    producer = producer_of(gpt2)
    model = producer.model.double()
    rows = torch.cat([group.rows[0] for group in producer.groups()]).float()
    ordinary = Ordinary.of(rows, 1.3)
    units = Standardization.of([ordinary])
    torch.manual_seed(1)
    sae = SAE(rows.shape[1], 24, TopK(3)).double()
    for parameter in sae.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    task = end_to_end(producer, kind)
    batch = task.batch(0)
    loss = task.loss(sae, units, ordinary, batch)
    found = torch.autograd.grad(loss, [*sae.parameters()])
    replaced = 0

    def dense(keep: Tensor, module: Any, inputs: Any, x: Tensor) -> Tensor:
        nonlocal replaced
        distance = (x - ordinary.mean).norm(dim=-1)
        keep = keep & (distance <= ordinary.limit)
        replaced += int(keep.sum())
        scale, mean = units.factors.double(), units.mean.double()
        pre = ((x - mean) * scale - sae.b_dec) @ sae.W_enc.T + sae.b_enc
        kept = torch.zeros_like(pre).scatter(-1, pre.topk(3).indices, 1)
        recon = (pre * kept).relu() @ sae.W_dec + sae.b_dec
        return torch.where(keep[..., None], recon / scale + mean, x)

    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for ids, mask, keep in zip(*batch, strict=True):
        ids, keep = ids[mask.bool()][None], keep[mask.bool()][None]
        clean = log_softmax(model(input_ids=ids).logits, -1)[:, :-1][keep[:, 1:]]
        handle = model.get_submodule(HOOK).register_forward_hook(partial(dense, keep))
        changed = log_softmax(model(input_ids=ids).logits, -1)[:, :-1][keep[:, 1:]]
        handle.remove()
        tokens += len(clean)
        if kind == "kl":
            total = total + (clean.exp() * (clean - changed)).sum()
        else:
            total = total + cross_entropy(changed, ids[:, 1:][keep[:, 1:]], reduction="sum")
    assert 0 < replaced < int(batch.keep.sum()) < batch.keep.numel()
    torch.testing.assert_close(loss, total / tokens, rtol=1e-9, atol=0)
    wanted = torch.autograd.grad(total / tokens, [*sae.parameters()])
    for one, other in zip(found, wanted, strict=True):
        assert other.abs().max() > 1e-4
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6 * float(other.abs().max()))


def test_the_term_and_the_rows_do_not_see_each_other(gpt2: Path):
    """A thread runs the same model all the while, as the loader of batches does."""
    producer = producer_of(gpt2)
    rows = [group.rows[0] for group in producer.groups()]
    ordinary, sae = Ordinary.of(torch.cat(rows), None), SAE(16, 24, TopK(3))
    task = end_to_end(producer)
    batch, units = task.batch(0), Standardization.of([ordinary])
    alone = task.loss(sae, units, ordinary, batch)
    done, produced = threading.Event(), list[Tensor]()

    def produce() -> None:
        while not done.is_set():
            produced.extend(group.rows[0] for group in producer.groups())

    thread = threading.Thread(target=produce)
    thread.start()
    try:
        terms = [task.loss(sae, units, ordinary, batch) for _ in range(20)]
    finally:
        done.set()
        thread.join()
    assert all(torch.equal(term, alone) for term in terms)
    assert len(produced) > len(rows)
    for n, x in enumerate(produced):
        assert torch.equal(x, rows[n % len(rows)])


def test_windows_follow_from_the_seed_and_the_step(gpt2: Path):
    task = end_to_end(producer_of(gpt2))
    first, again, other = task.batch(0), task.batch(0), task.batch(1)
    assert torch.equal(first.input_ids, again.input_ids)
    assert not torch.equal(first.input_ids, other.input_ids)
    assert first.keep[:, 1:].any(1).all()  # each window has a token to predict


def test_a_stopped_run_resumes_bit_for_bit(
    gpt2: Path, text: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out, take = tmp_path / "stopped", Trainer.take

    def stopping(self, batches, step, interrupts):
        if step == 7:
            raise Stop
        return take(self, batches, step, interrupts)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Trainer, "take", stopping)
        train(words(out, gpt2, text, *TERM))
    train(["--resume", "--out", str(out)])
    assert (out / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    one, other = ([line["downstream"] for line in lines(run)] for run in (out, whole))
    assert one == other and len(one) == 2 and min(one) > 0


def test_a_coefficient_of_0_only_measures(gpt2: Path, text: Path, tmp_path: Path, capsys):
    measured, plain = tmp_path / "measured", tmp_path / "plain"
    train(words(measured, gpt2, text, "--downstream", "ce", "--downstream-coef", "0"))
    value = lines(measured)[-1]["downstream"]
    assert value > 0 and f"downstream {value:.4f}" in capsys.readouterr().err
    train(words(plain, gpt2, text, "--step", "autograd"))
    assert (measured / WEIGHTS).read_bytes() == (plain / WEIGHTS).read_bytes()
    for one, other in zip(lines(measured), lines(plain), strict=True):
        assert one["loss"] == other["loss"] and "downstream" not in other


def test_it_lowers_the_divergence_on_held_out_text(gpt2: Path, text: Path, tmp_path: Path):
    found = list[float]()
    size = "--d-sae 64 --k 6 --lr 0.001 --steps 40"
    for kind, coef in (("kl", ["--downstream-coef", "30"]), ("none", [])):  # the KL is about 0.01
        out = tmp_path / kind
        train(words(out, gpt2, text, *size.split(), "--downstream", kind, *coef))
        evaluate([str(out), "--batch-windows", "16"])
        found.append(json.loads((out / "eval.json").read_text())["downstream"]["kl"])
    assert found[0] < 0.8 * found[1]


def test_each_hookpoint_has_a_term_of_its_own(gpt2: Path, text: Path, whole: Path, tmp_path: Path):
    out = tmp_path / "both"
    train(words(out, gpt2, text, "--hookpoint", *HOOKS[1:], *TERM))  # beside the first
    assert (out / HOOK / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    one, other = (lines(out / hookpoint)[-1]["downstream"] for hookpoint in HOOKS)
    assert one != other


class Rows:
    """A producer of no model."""

    widths, fingerprint = {"rows": 16}, "rows"

    def groups(self, start: Any = (), part: Any = "train"):
        return iter(())


def test_sources_that_have_no_predictions(gpt2: Path, activations: Path, tmp_path: Path):
    from transformers import GPT2Model

    config = TrainConfig(downstream="kl", steps=5, d_sae=64, out=tmp_path / "run")
    producer = producer_of(gpt2)
    headless = ModelProducer(
        GPT2Model.from_pretrained(gpt2), load_tokenizer(str(gpt2)), TEXTS, ["h.0"], context_length=8
    )
    single = ModelProducer(
        producer.model, load_tokenizer(str(gpt2)), ["a", "b"], [HOOK], context_length=8
    )
    for source, message in [
        (ActivationShards(activations), "needs a stream from a model, got ActivationShards"),
        (Stream(Rows()), "needs a stream from a model, got Rows"),
        (Stream(headless), "needs a causal language model with its head, got GPT2Model"),
        (Stream(single), "needs text to predict: no context has two tokens"),
    ]:
        with pytest.raises(ValueError, match=f'^downstream "kl" {message}$'):
            Trainer(config, source)
    with pytest.raises(ValueError, match="^--downstream needs --model, which it runs$"):
        train(["--downstream", "kl", "--out", str(tmp_path / "demo")])
    assert not (tmp_path / "run").exists() and not (tmp_path / "demo").exists()
