"""Trains dense PyTorch with fastsae's recipe: the same initialization, schedule and aux-k."""

import torch

from bench.dense import DenseTopK, dense_adam, dense_step
from fastsae.losses import default_k_aux
from fastsae.nn import init_from_data
from fastsae.train.optim import schedule
from fastsae.train.plan import Plan

from .task import Code, Stream, Task, Trained, code_of
from .train_fastsae import config_of


def train(task: Task, stream: Stream) -> Trained:
    """The settings are those that fastsae's plan gives for the task."""
    config = config_of(task)
    plan = Plan.of(config, task.d_in, len(stream.sample))
    generator = torch.Generator().manual_seed(config.seed)
    sae = init_from_data(config.build(task.d_in), stream.sample, generator).to(task.device)
    model = DenseTopK(sae)

    def code() -> Code:
        sae.load_state_dict(model.state_dict())
        return code_of(sae)

    stream.code = code
    adam = dense_adam(model, plan.lr)
    k_aux = default_k_aux(task.d_in)
    unfired = torch.zeros(task.d_sae, dtype=torch.int64, device=task.device)
    for step in range(plan.steps):
        factor = schedule(step, plan.steps, plan.warmup, config.optimizer.decay)
        adam.param_groups[0]["lr"] = plan.lr * factor
        _, fired = dense_step(model, adam, next(stream), unfired >= plan.dead_after, k_aux)
        unfired = (unfired + task.tokens).masked_fill(fired, 0)
    return Trained(code(), plan.lr, plan.warmup)
