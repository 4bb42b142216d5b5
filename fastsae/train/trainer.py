"""The training loop."""

import time
from typing import Any

import torch

from fastsae.checkpoint import load_checkpoint, save_checkpoint
from fastsae.data import ActivationSource, Batch
from fastsae.device import tf32_products
from fastsae.evals import reconstruction
from fastsae.files import write_json
from fastsae.losses import TrainingLoss
from fastsae.nn import SAE, init_from_data

from .config import TrainConfig
from .curves import plot_curves
from .gpu import GpuMeter
from .interrupt import Interrupted, Interrupts
from .log import Log, read_lines
from .memory import keep_freed_memory
from .optim import Adam, schedule
from .plan import Plan
from .run_folder import begin, check_same, claimed_run, latest
from .state import TrainState
from .step import autograd_step, fused_step

SAMPLE_TOKENS = 8192
EVALUATION_TOKENS = 65536


class Trainer:
    """Trains an SAE on a source of activations and leaves the results in config.out.

    The folder then holds config.json, metrics.jsonl, checkpoints/, sae/ (for `fastsae.load`),
    summary.json and, with matplotlib, curves.png. The same config, data and backend give the same
    bits, whether or not the run was interrupted and resumed.
    """

    def __init__(self, config: TrainConfig, source: ActivationSource):
        self.config, self.source = config, source
        self.plan = Plan.of(config, source.d_in, source.n_tokens)
        self.device = torch.device(self.plan.device)

    def fit(self, resume: bool = False) -> SAE:
        """Train to the last step and return the SAE, on the CPU, for activations as they are.

        Raises ValueError for a folder that holds another run, for data that does not fit, and for
        NaN or Inf in data or loss; `Interrupted` after a SIGINT or SIGTERM, once it has saved.
        """
        config = self.config
        keep_freed_memory()
        with claimed_run(config.out), Interrupts() as interrupts:
            state = self.start(resume)
            pin = self.device.type == "cuda"
            with (
                Log(config, self.plan.steps, state.step) as log,
                self.source.batches(
                    config.batch_size, config.seed, state.cursor, pin_memory=pin
                ) as batches,
            ):
                resumed = f"; resumed at step {state.step}" if state.step else ""
                log.say(self.describe(state.sae) + resumed)
                self.loop(state, batches, log, interrupts)
            return self.finish(state)

    def start(self, resume: bool) -> TrainState:
        """The state to go on from: initialised from a sample of the data, or a checkpoint's."""
        config = self.config
        if resume:
            check_same(config, self.plan, self.source.fingerprint)
        mean_square = self.source.mean_square
        if not 0 < mean_square < torch.inf:
            raise ValueError(f"activations must have a mean square above 0, got {mean_square}")
        scale = mean_square**-0.5
        sample = self.source.sample(SAMPLE_TOKENS, config.seed) * scale
        if not (sample != sample[0]).any():
            raise ValueError("activations must differ from each other: all that were drawn are one")
        generator = torch.Generator().manual_seed(config.seed)
        sae = init_from_data(config.build(self.source.d_in), sample, generator).to(self.device)
        state = TrainState.fresh(sae, self.optimizer(sae), scale)
        if not resume:  # last, so that a start that fails leaves nothing behind
            begin(config, self.plan, self.source.fingerprint)
        checkpoint = latest(config.out) if resume else None
        if checkpoint is not None:
            state.restore(*load_checkpoint(checkpoint))
        return state

    def optimizer(self, sae: SAE) -> Adam:
        """Adam, with the bfloat16 copies that the precision asks for."""
        shadows = ("W_enc",) if self.device.type == "cpu" else ("W_enc", "W_dec")
        return Adam(
            sae,
            moments=torch.bfloat16 if self.config.adam_moments == "bf16" else None,
            window=self.config.adam_window,
            shadows=shadows if self.plan.encoder_precision == "bf16" else (),
            seed=self.config.seed,
        )

    def loop(self, state: TrainState, batches, log: Log, interrupts: Interrupts) -> None:
        config, meter = self.config, GpuMeter(self.device)
        last = time.perf_counter()
        while state.step < self.plan.steps:
            batch = self.load(batches, state)
            result = self.step(state, batch)
            state.advance(result, len(batch.x), batch.cursor)
            if self.device.type == "cpu":
                self.check_finite(state, batch)
            now = time.perf_counter()
            state.seconds, last = state.seconds + now - last, now

            done = state.step == self.plan.steps
            if done or state.step % config.log_every == 0:
                self.check_finite(state, batch)
                log.write({**state.metrics(self.plan.dead_after), **meter.read()})
            log.advance()
            if done or interrupts.signum or state.step % config.checkpoint_every == 0:
                self.save(state)
            if interrupts.signum and not done:
                raise Interrupted(
                    interrupts.signum,
                    f"stopped at step {state.step} of {self.plan.steps}, saved; "
                    f"go on with --resume --out {config.out}",
                )

    def load(self, batches, state: TrainState) -> Batch:
        """The next batch, scaled, on the device."""
        try:
            batch = next(batches)
        except ValueError as error:
            raise ValueError(f"step {state.step + 1}: {error}") from error
        x = batch.x.to(self.device, non_blocking=True)
        return batch._replace(x=x.mul_(state.scale))

    def step(self, state: TrainState, batch: Batch) -> TrainingLoss:
        """One update of the weights."""
        config, plan = self.config, self.plan
        factor = schedule(state.step, plan.steps, plan.warmup, config.decay)
        state.adam.begin_step(plan.lr * factor)
        if config.auxk_coef and state.step % plan.dead_every == 0:
            state.find_dead(plan.dead_after)
        take = fused_step if plan.step == "fused" else autograd_step
        with tf32_products(plan.encoder_precision == "tf32"):
            return take(state.sae, state.adam, batch.x, state.dead, config.auxk_coef, plan.k_aux)

    def check_finite(self, state: TrainState, batch: Batch) -> None:
        """ValueError if the loss was NaN or Inf since the last line; on a CPU, at this step."""
        if not torch.isfinite(state.sums).all():
            largest = int(batch.rows[int(batch.x.abs().amax(1).argmax())])
            raise ValueError(
                f"the loss is NaN or Inf at step {state.step}: no checkpoint was written since; "
                f"the batch's largest activation is in {self.source.where(largest)}; "
                f"if that is sound, try a lower --lr (it is {self.plan.lr:.3g})"
            )

    def save(self, state: TrainState) -> None:
        if not all(weight.isfinite().all() for weight in state.sae.parameters()):
            raise ValueError(f"the weights are NaN or Inf after step {state.step}: not saved")
        folder = self.config.out / "checkpoints"
        save_checkpoint(
            folder, state.step, state.tensors(), state.meta(), self.config.keep_checkpoints
        )

    def describe(self, sae: SAE) -> str:
        """What the run does, in a line."""
        config = self.config
        name = f"{config.activation} (k = {config.k})"
        if config.gradient == "rotation":
            name += f" with a {config.rotation or 'support'} rotation gradient"
        return (
            f"{name}, {config.d_sae} latents of width {sae.d_in}, {self.plan.steps} steps of "
            f"{config.batch_size} tokens on {self.plan.device}, {self.plan.step} step, "
            f"{self.plan.encoder_precision} encoder"
        )

    def finish(self, state: TrainState) -> SAE:
        """Save the SAE with the activations' scale folded in, its numbers and its curves."""
        config = self.config
        state.adam.settle()
        sae = state.sae.cpu().fold_scale_(state.scale)
        sae.save(config.out / "sae")
        data = self.source.heldout or self.source
        result = reconstruction(sae, data, max_tokens=EVALUATION_TOKENS, device=self.device)
        lines = read_lines(config.out / "metrics.jsonl")
        plot_curves(lines, config.out / "curves.png", self.describe(sae))
        summary: dict[str, Any] = {
            "fvu": result.fvu,
            "l0": result.l0,
            "dead_fraction": result.dead_fraction,
            "evaluated_on": "held-out data" if self.source.heldout else "training data",
            "evaluated_tokens": result.tokens,
            "tokens": state.tokens,
            "tokens_per_second": state.tokens / state.seconds,
            "seconds": state.seconds,
            "step_path": self.plan.step,
        }
        write_json(config.out / "summary.json", summary)
        return sae.cpu()
