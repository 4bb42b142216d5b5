"""Held-out FVU of `fastsae train` on the demo, against a dense PyTorch trainer of the same recipe.

Same activations, order, initialization, schedule and aux-k; the dense trainer is bench/dense.py.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from fastsae import SAE, TopK
from fastsae.data import ActivationShards, demo_shards
from fastsae.evals import reconstruction
from fastsae.nn import Init, init_from_data
from fastsae.train import Optimizer, TrainConfig, Trainer
from fastsae.train.optim import schedule
from fastsae.train.plan import Plan
from fastsae.train.trainer import SAMPLE_TOKENS

from .contender import Contender
from .dense import DenseTopK, dense_adam, dense_step
from .record import write

CONTENDERS = {
    "fastsae": Contender(),
    "bf16 encoder": Contender(options={"encoder_precision": "bf16"}),
    "bf16 moments": Contender(options={"optimizer": Optimizer(adam_moments="bf16")}),
    "window of 8": Contender(options={"optimizer": Optimizer(adam_window=8)}),
    "tied encoder": Contender(options={"init": Init(encoder="tied")}),
    "dense": Contender("dense"),
}


def train_dense(config: TrainConfig, source: ActivationShards) -> SAE:
    """The SAE that dense PyTorch trains, for activations as they are."""
    plan = Plan.of(config, source.d_in, source.n_tokens)
    scale = source.mean_square**-0.5
    sample = source.sample(SAMPLE_TOKENS, config.seed) * scale
    generator = torch.Generator().manual_seed(config.seed)
    sae = init_from_data(config.build(source.d_in), sample, generator).to(plan.device)
    model = DenseTopK(sae)
    adam = dense_adam(model, plan.lr)
    unfired = torch.zeros(config.d_sae, dtype=torch.int64, device=plan.device)
    with source.batches(config.batch_size, config.seed) as batches:
        for step in range(plan.steps):
            factor = schedule(step, plan.steps, plan.warmup, config.optimizer.decay)
            adam.param_groups[0]["lr"] = plan.lr * factor
            dead = unfired >= plan.dead_after
            x = next(batches).x.to(plan.device) * scale
            _, fired = dense_step(model, adam, x, dead, plan.k_aux)
            unfired = (unfired + config.batch_size).masked_fill(fired, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            sae.get_parameter(name).copy_(parameter)
    return sae.fold_scale_(scale).cpu()


@torch.no_grad()
def bf16_agreement(sae: SAE, data: ActivationShards) -> float:
    """Share of the active entries that candidates from a bf16 product leave as they are."""
    assert isinstance(sae.activation, TopK)
    shadow, same, active = sae.W_enc.bfloat16(), 0, 0
    for rows in torch.arange(data.n_tokens).split(4096):
        centred = sae.centre(sae.tokens(data.rows(rows)))
        exact = sae.encode(data.rows(rows))
        low = sae.activation.encode(centred, sae.W_enc, sae.b_enc, shadow=shadow)
        same += int(((exact.to_dense() != 0) & (low.to_dense() != 0)).sum())
        active += int(exact.active.sum())
    return same / active


def bench(steps: int, variants: list[str]) -> None:
    if unknown := set(variants) - set(CONTENDERS):
        raise ValueError(f"variants are {', '.join(CONTENDERS)}: got {', '.join(unknown)}")
    source = demo_shards()
    heldout = source.heldout
    assert heldout is not None
    tokens = {"train_tokens": source.n_tokens, "heldout_tokens": heldout.n_tokens}
    for name in variants:
        contender = CONTENDERS[name]
        with tempfile.TemporaryDirectory() as folder:
            config = TrainConfig(steps=steps, out=Path(folder) / "run", **contender.options)
            start = time.perf_counter()
            sae = Trainer(config, source).fit() if contender.ours else train_dense(config, source)
            seconds = time.perf_counter() - start
        result = reconstruction(sae, heldout)
        found: dict[str, Any] = {
            **{n: getattr(config, n) for n in ("steps", "batch_size", "d_sae")},
            "k": sae.activation.cfg.k,
            **tokens,
            "held-out FVU": round(result.fvu, 5),
            "never active": round(result.dead_fraction, 5),
            "L0": round(result.l0, 3),
            "seconds": round(seconds, 1),
        }
        if name == "fastsae":
            found["bf16_agreement"] = bf16_agreement(sae, heldout)
        print(name, found, flush=True)
        write("quality-cpu", {name: found})
