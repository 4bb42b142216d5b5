"""The training loop."""

import copy
import time
from collections.abc import Sequence

import torch

from fastsae.checkpoint import Checkpoint, save_checkpoint
from fastsae.codes import Codes
from fastsae.data import ActivationSource, Batch, Batches, Stream, as_source, check_evaluable
from fastsae.data.ordinary import SAMPLE_TOKENS, Ordinary
from fastsae.data.source import Shuffled
from fastsae.device import tf32_products
from fastsae.distributed.parallelize import parallelize, per_latent
from fastsae.losses import TrainingLoss
from fastsae.meeting import everywhere, on_first
from fastsae.memory import keep_freed_memory, release_freed_memory
from fastsae.nn import SAE, init_from_data
from fastsae.progress import say
from fastsae.shards import ONE_PROCESS, Shards
from fastsae_kernels import WIDEST

from .callbacks import Callback, Callbacks, callbacks_of, check_heldout
from .columns import Columns
from .config import TrainConfig
from .conflicts import check_mesh
from .describe import describe, describe_data
from .end_to_end import EndToEnd
from .facts import MemoryMeter
from .forecast import check_fits, describe_forecast, forecast_of
from .gpu import GpuMeter
from .graph import CapturedStep
from .interrupt import Interrupts
from .log import Log, Unlogged, plain_numbers
from .loggers import Logger, Loggers, loggers_of
from .optim import schedule
from .plan import Plan, adam_of, check_batch
from .results import write_results
from .run_folder import begin, check_same, check_start, claimed_run, set_length
from .standardization import Standardization, replace_rows
from .start_from import check_same_form, copy_weights_
from .state import TrainState, names_per_latent
from .step import autograd_step, candidate_recall, fused_step
from .together import check_same_run, latest, take_together


class Trainer:
    """Trains an SAE on activations and leaves the results in config.out.

    The folder then holds config.json, metrics.jsonl, checkpoints/, sae/ (for `fastsae.load`),
    sae_lens/ if SAELens supports them, summary.json and, with matplotlib, curves.png. The same
    config, data and backend give the same bits, whether or not the run was interrupted and resumed.
    The source is whatever `as_source` takes: a tensor, a path, a DataLoader, a generator function.
    For a transcoder, it is `Joined(inputs, targets)`, for a crosscoder `Joined(*layers)`. With
    `start_from`, an SAE of config's shape and activation for activations as they are, training
    continues from its weights. A run can be resumed with another number of steps; what is planned
    from it, such as the learning rate's decay, is then as in a run of that length.

    With `shards`, a `fastsae.distributed.Mesh`, many processes make one run: each of them makes the
    same Trainer, and holds its share of the latents. Batches keep their size, so the run is that of
    one process, up to rounding. Only process 0 shows, logs and locks the folder, which all need.
    """

    def __init__(
        self,
        config: TrainConfig,
        source: object,
        start_from: SAE | None = None,
        callbacks: Sequence[Callback] = (),
        progress: bool = True,
        shards: Shards = ONE_PROCESS,
        loggers: Sequence[Logger] = (),
    ):
        """Without `progress`, nothing but warnings is shown on stderr."""
        self.config, self.start_from, self.shards = config, start_from, shards
        self.source = source = as_source(source)
        self.progress = progress and shards.rank == 0
        self.name = ""
        """Of the SAE in a sweep."""
        if isinstance(source, Stream):
            source.divide(shards)
        # Files, memory and packages may differ. Nothing in it waits for other processes.
        several = everywhere(shards, lambda: self._prepare(callbacks, loggers))
        self.callbacks = Callbacks(several, shards)
        if isinstance(source, Stream):
            check_heldout(config, source)  # runs the model: an error of one process is one of all

    def _prepare(self, callbacks: Sequence[Callback], loggers: Sequence[Logger]) -> list[Callback]:
        """What each process does for itself; returns the run's callbacks."""
        config, source, start_from = self.config, self.source, self.start_from
        check_mesh(config, self.shards, start_from)
        check_evaluable(source)
        several = callbacks_of(config, callbacks)
        if not isinstance(source, Stream):
            check_heldout(config, source)
        self.loggers = Loggers([] if self.shards.rank else loggers_of(config, loggers))
        self.columns = Columns.of(config, source)
        self.end_to_end = EndToEnd.of(config, source)
        check_batch(config.batch_size, source.n_tokens, source.d_in)
        about = self.columns.width_out, source.n_tokens, self.shards.latent
        self.plan = Plan.of(config, *about)
        self.device = torch.device(self.plan.device)
        self.meter = GpuMeter(self.device)
        self.memory: MemoryMeter | None = None
        self.forecast = forecast_of(self)
        """What the run needs. `fastsae.train.forecast.timed` adds the time of a step."""
        self.captured: CapturedStep | None = None
        self.ordinary: list[Ordinary] = []
        self.left_out = 0.0
        """Fraction of a sample of tokens that training leaves out."""
        if start_from is not None:
            with torch.device("meta"):
                check_same_form(self.columns.build(config), start_from)
        return several

    def fit(self, resume: bool = False) -> SAE:
        """Train to the last step and return the SAE, on the CPU, for activations as they are. Where
        processes divide the latents, it has this one's, and all must call it at once.

        Raises ValueError for a folder that holds another run, for data that does not fit, and for
        NaN or Inf in data or loss; `Interrupted` after SIGINT, SIGTERM or SIGHUP, once saved.
        """
        config = self.config
        keep_freed_memory()
        settled = {"settings": config, "what follows from them": self.plan, "--resume": resume}
        check_same_run(self.shards, settled, self.source, config.seed)
        everywhere(self.shards, lambda: check_fits([self.forecast]))
        self.memory = MemoryMeter(self.device)
        with self.memory, claimed_run(config.out, self.shards):
            state = self.start(resume, latest([self])[0] if resume else None)
            self.release_memory()  # of the sample
            with self.loggers.started(config.out, state.step):
                self.loop(state)
                if isinstance(self.source, Stream):
                    self.say(self.source.report(state.tokens))
                return self.finish(state)

    def loop(self, state: TrainState) -> None:
        """Take steps to the end of the run."""
        config = self.config
        with (
            Interrupts() as interrupts,
            self.log(state) as log,
            self.batches(state) as batches,
        ):
            resumed = f"; resumed at step {state.step}" if state.step else ""
            self.say(describe(self, state.sae) + resumed)
            self.say(describe_data(self))
            self.say(describe_forecast(self.forecast))
            while not self.ended(state):
                start = time.perf_counter()
                batch = take_together([(self, state)], batches, interrupts, config.out, state.step)
                self.advance(state, self.standardized(batch, state), log, start)

    def start(self, resume: bool, checkpoint: Checkpoint | None) -> TrainState:
        """The initial state, from a sample of the data, or a checkpoint's."""
        config, columns = self.config, self.columns
        if resume:
            check_same(config, self.plan, self.source.fingerprint, self.start_from)
            if checkpoint is None and self.start_from is None:
                check_start(config.out)
        units = self.standardization()
        sample = units(self.source.sample(SAMPLE_TOKENS, config.seed).clone())
        x, target = columns.split(sample[units.ordinary(sample)])
        generator = torch.Generator().manual_seed(config.seed)
        torch.manual_seed(config.seed)  # for activations with noise
        with torch.device("meta" if self.shards.size > 1 else "cpu"):
            sae = columns.build(config)
        parallelize(sae, self.shards)
        if self.start_from is None:
            init_from_data(sae, x, generator, target, config.init)
        else:
            copy_weights_(sae, columns.unfold_(copy.deepcopy(self.start_from).float().cpu(), units))
        self.release_memory()  # of drawing weights; moments do not fit into all of its holes
        sae.to(self.device)
        downstream = self.end_to_end is not None
        state = TrainState.fresh(sae, adam_of(sae, config, self.plan, x), units, downstream)
        if not resume:  # last, so that a failed start leaves no files
            about = config, self.plan, self.source.fingerprint, self.start_from
            on_first(self.shards, lambda: begin(*about))
            if self.start_from is not None:
                self.save(state)  # a resumed run then needs only the folder
        if checkpoint is not None:
            state.restore(*checkpoint)
            if state.stopped and state.stopped[1] != self.plan.steps:
                state.stopped = None  # another number of steps was asked for since
        if resume:
            on_first(self.shards, lambda: set_length(config, self.plan, state.step))
        if self.captures:
            required = config.cuda_graph == "on"
            self.captured = CapturedStep(sae, state.adam, config.objective, required)
        return state

    def standardization(self) -> Standardization:
        """What training does to the data first, found in a sample. It depends on the data and on
        settings that the SAEs of a sweep share. ValueError for data that it cannot train on."""
        ratio = self.config.max_norm_ratio
        self.ordinary = self.columns.ordinary(ratio)
        units = self.columns.standardization(self.ordinary)
        kept = units.ordinary(units(self.source.sample(SAMPLE_TOKENS).clone()))
        self.left_out = 1 - float(kept.double().mean())
        if self.left_out > 0.9:  # each source keeps at least half, but the halves may not overlap
            raise ValueError(
                f"{self.left_out:.1%} of tokens would be left out: few tokens are within the norm "
                f"limit in every source; raise --max-norm-ratio, which is {ratio}, or set it to "
                f"none"
            )
        return units

    @property
    def captures(self) -> bool:
        """Whether steps without dead latents are replayed as a CUDA graph."""
        wanted = self.config.cuda_graph != "off" and self.config.not_captured is None
        fits = self.shards.size == 1 and self.columns.width_out <= WIDEST
        return wanted and self.device.type == "cuda" and fits

    def batches(self, state: TrainState, source: ActivationSource | None = None) -> Batches:
        """The batches from where the run stands; those of a sweep's source, if it is given."""
        config = self.config
        seed = config.seed if config.data_seed is None else config.data_seed
        pin, source = self.device.type == "cuda", source or self.source
        arguments = config.batch_size, seed, state.cursor, pin
        if type(source).batches is Shuffled.batches and self.shards.size > 1:
            part = self.shards.rank, self.shards.size
            return source.batches(*arguments, part=part)  # pyright: ignore[reportCallIssue]
        return source.batches(*arguments)

    def take(self, batches: Batches, step: int, interrupts: Interrupts) -> Batch | None:
        """The next batch, after `step`; None if a signal comes before it."""
        try:
            return batches.take(lambda: interrupts.signum)
        except ValueError as error:
            raise ValueError(f"step {step + 1}: {error}") from error

    def standardized(self, batch: Batch, state: TrainState) -> Batch:
        """A batch as training sees it, on the device, with the tokens of all processes."""
        own, share = batch.x, self.config.batch_size // self.shards.size
        if self.shards.size > 1 and len(own) > share:  # of a source that gives whole batches
            own = own[self.shards.rank * share :][:share]
        x = self.shards.gather_tokens(own.to(self.device, non_blocking=True))
        x = state.units(x)
        kept = state.units.ordinary(x)
        return batch._replace(x=replace_rows(x, kept), kept=kept)

    def advance(
        self, state: TrainState, batch: Batch, log: Log, start: float, codes: Codes | None = None
    ) -> None:
        """One step, timed from start, with the log's line and the checkpoint that are then due.

        `codes` are the batch's, if a stack of SAEs has already encoded it.
        """
        config = self.config
        result = self.step(state, batch, codes)
        state.advance(result, batch)
        if self.device.type == "cpu":
            self.check_finite(state, batch)
        state.seconds += time.perf_counter() - start

        self.callbacks.on_step(self, state)
        logs = config.log_every, config.eval_every or config.log_every
        logged, saved = (
            self.ended(state) or not all(state.step % every for every in due)
            for due in (logs, [config.checkpoint_every])
        )
        if logged or saved:
            start = time.perf_counter()
            self.check_finite(state, batch)  # waits for a GPU, which may be several steps behind
            state.seconds += time.perf_counter() - start
        if logged:
            source = self.source
            numbers = source.readings(batch.rows) if isinstance(source, Stream) else {}
            numbers |= candidate_recall(state.sae, state.adam, self.columns.split(batch.x)[0])
            line = {**state.metrics(self.plan.dead_after), **self.meter.read(), **numbers}
            self.callbacks.on_log(self, state, line)
            log.write(plain_numbers(line))
        log.advance()
        if self.ended(state) or saved:
            self.save(state)

    def ended(self, state: TrainState) -> bool:
        return state.stopped is not None or state.step >= self.plan.steps

    def step(self, state: TrainState, batch: Batch, codes: Codes | None) -> TrainingLoss:
        """One update of the weights."""
        config, plan, objective = self.config, self.plan, self.config.objective
        factor = schedule(state.step, plan.steps, plan.warmup, config.optimizer.decay)
        state.adam.begin_step(plan.lr * factor)
        if objective.auxk_coef and state.step % plan.dead_every == 0:
            state.find_dead(plan.dead_after)
        x, target = self.columns.split(batch.x)
        dead = state.dead if state.n_dead else None
        with tf32_products(plan.encoder_precision == "tf32"):
            if plan.step == "fused":
                aux = objective.auxk_coef and state.n_dead
                if self.captured is not None and codes is None and not aux:
                    return self.captured(x)
                return fused_step(state.sae, state.adam, x, dead, objective, codes)
            progress = (state.step + 1) / plan.steps
            downstream = self.end_to_end and self.end_to_end.term(state, self.ordinary[0])
            settings = objective, target, progress, downstream
            return autograd_step(state.sae, state.adam, x, dead, *settings)

    def check_finite(self, state: TrainState, batch: Batch) -> None:
        """ValueError if the loss was NaN or Inf since the last line; on a CPU, at this step."""
        if not torch.isfinite(state.sums).all():
            size = batch.x.abs().amax(1)
            size = size if batch.kept is None else size.where(batch.kept, 0.0)
            largest = int(batch.rows[int(size.argmax())])
            raise ValueError(
                f"the loss is NaN or Inf at step {state.step}: no checkpoint was written since; "
                f"the batch's largest activation is in {self.source.where(largest)}; "
                f"if that row looks valid, lower --lr (it is {self.plan.lr:.3g})"
            )

    def save(self, state: TrainState) -> None:
        # By extremes, which are NaN if a weight is: isfinite makes temporaries of a weight's size.
        extremes = [torch.stack(weight.aminmax()) for weight in state.sae.parameters()]
        finite = torch.stack(extremes).isfinite().all()
        if self.shards.control.largest(not finite):
            raise ValueError(f"the weights are NaN or Inf after step {state.step}: not saved")
        folder, keep = self.config.out / "checkpoints", self.config.keep_checkpoints
        names = names_per_latent(per_latent(state.sae))
        contents = state.tensors(), state.meta(), keep
        save_checkpoint(folder, state.step, *contents, names, self.shards)
        if state.step:
            self.callbacks.on_checkpoint(self, state)

    def snapshot(self, state: TrainState) -> SAE:
        """A copy of the SAE as it would be saved now, on the CPU, for activations as they are."""
        sae = copy.deepcopy(state.sae)
        state.adam.flush_copy(sae)
        return self.columns.fold_(sae.cpu().eval(), state.units)

    def log(self, state: TrainState, shown: bool = True) -> Log:
        """Where lines go from here: nowhere, except of process 0."""
        if self.shards.rank:
            return Unlogged()
        shown = shown and self.progress
        return Log(self.config.out, self.plan.steps, state.step, shown, self.loggers)

    def release_memory(self) -> None:
        """Hand freed memory back to the system, so that it does not add up."""
        if self.memory is not None:
            self.memory.note()
        release_freed_memory()

    def say(self, text: str) -> None:
        if self.progress:
            say(text)

    def finish(self, state: TrainState) -> SAE:
        """Leave the run's results, and return the SAE for activations as they are."""
        self.captured = None  # frees the graph's memory
        state.adam.flush()
        state.adam.free()
        self.release_memory()  # of steps
        sae = self.columns.fold_(state.sae.cpu().eval(), state.units)
        write_results(self, state, sae)
        if self.shards.latent == 1:  # whole, it needs no other process from here on
            sae.shards = sae.activation.shards = ONE_PROCESS
        self.callbacks.on_end(self, sae.cpu())
        self.loggers.finish(self.config.out)
        return sae
