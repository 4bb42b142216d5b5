"""Several SAEs trained together on one pass over the same activations.

Each is a run like any other, with a folder of its own under the sweep's, and takes the same batches
in the same order: they are read and shuffled once for all. SAEs for several hookpoints of a stream
take the same tokens. TopK SAEs of one shape and hookpoint share the encoder GEMM, unless they keep
copies in less precision or are faster in bfloat16 one by one.
"""

import dataclasses
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fastsae.codes import Codes
from fastsae.config import to_dict
from fastsae.data import ActivationSource, Batch, Stream, as_source
from fastsae.files import read_json, shown, write_json
from fastsae.meeting import everywhere, on_first
from fastsae.memory import keep_freed_memory
from fastsae.nn import SAE
from fastsae.progress import printable, progress_bar, shows_bars
from fastsae.shards import ONE_PROCESS, Shards
from fastsae.version import __version__, written_by

from .comparison import compare
from .config import TrainConfig, read_config
from .describe import describe
from .forecast import check_fits
from .interrupt import Interrupts
from .log import Log
from .run_folder import claimed_run, resolved
from .stacked import Stack, stacks
from .state import TrainState
from .together import check_same_run, latest, take_together, wait_for_groups
from .trainer import Trainer

FORMAT = "fastsae.sweep.1"
SHARED = (
    *("data", "stream", "target", "layers", "layer_norm", "max_norm_ratio", "steps"),
    *("batch_size", "device", "checkpoint_every", "keep_checkpoints", "log_every", "eval_every"),
)


class Sweep:
    """Trains the SAEs of several configs and leaves a comparison of them in `out`.

    `out` then holds a run's folder for each, comparison.json and, with matplotlib, comparison.png.
    With `shards`, a `fastsae.distributed.Mesh`, the processes share the SAEs out: each is trained
    by one process, or by those of `group`, which is a `shards.part(data, latent)`, and the others
    are not waited for. Each group makes the rows of a stream for itself. Process 0 compares the
    SAEs at the end.
    """

    def __init__(
        self,
        configs: dict[str, TrainConfig],
        source: object,
        out: Path,
        progress: bool = True,
        shards: Shards = ONE_PROCESS,
        group: Shards = ONE_PROCESS,
    ):
        """Configs by name; their `out` becomes the folder of that name, and their data come in the
        order of the first one's seed. ValueError unless there are some, as many as groups, and they
        share SHARED. With patience, an SAE may end before the others. Without `progress`, nothing
        but warnings is shown on stderr."""
        check_together(configs)
        check_groups(len(configs), shards.size, group.size)
        first = next(iter(configs.values()))
        seed = first.seed if first.data_seed is None else first.data_seed
        self.source = source = as_source(source)
        self.out, self.shards, self.group = out, shards, group
        self.progress = progress and shards.rank == 0
        self.configs = {
            name: dataclasses.replace(config, out=out / name, data_seed=seed)
            for name, config in configs.items()
        }
        """Of all SAEs; `trainers` are those of this process."""
        names = [*configs][shards.rank // group.size :: shards.size // group.size]
        self.first, self.trainers = names[0], dict[str, Trainer]()
        sources = everywhere(shards, lambda: [self._source_of(name) for name in names])
        # Not inside of `everywhere`: a process would wait in it for one that waits for its group.
        # A group that fails ends, which the others notice in `fit`.
        for name, own in zip(names, sources, strict=True):
            config = self.configs[name]
            self.trainers[name] = Trainer(config, own, progress=self.progress, shards=group)
            self.trainers[name].name = name

    def _source_of(self, name: str) -> ActivationSource:
        source, config = self.source, self.configs[name]
        if isinstance(source, Stream) and config.stream is not None:
            return source.select(*config.hookpoints)
        return source

    def fit(self, resume: bool = False) -> dict[str, SAE]:
        """Train all to the last step. Raises what `Trainer.fit` does."""
        keep_freed_memory()
        settled = {"settings": self.configs, "--resume": resume}
        own_model = isinstance(self.source, Stream)  # of each group, and may round differently
        check_same_run(self.shards, settled, self.source, None if own_model else 0)
        if own_model:
            check_same_run(self.group, {}, self.source, seed=0)
        forecasts = [trainer.forecast for trainer in self.trainers.values()]
        everywhere(self.shards, lambda: check_fits(forecasts))
        with claimed_run(self.out, self.shards), ExitStack() as stack:
            if not resume:
                for first, *_ in self.sites:
                    self.trainers[first].standardization()  # a failed start leaves no files
                on_first(self.shards, lambda: begin(self.out, self.configs))
            for trainer in self.trainers.values():
                stack.enter_context(claimed_run(trainer.config.out, self.group))
            states = self.start(resume)
            interrupts = stack.enter_context(Interrupts())
            logs = {}
            for name, trainer in self.trainers.items():
                started = trainer.loggers.started(trainer.config.out, states[name].step)
                stack.enter_context(started)
                log = trainer.log(states[name], shown=False)
                logs[name] = stack.enter_context(log)
                trainer.say(f"{name}: {describe(trainer, states[name].sae)}")
            self.loop(states, logs, interrupts)
            if isinstance(self.source, Stream):
                drawn = max(state.tokens for state in states.values())
                self.trainers[self.first].say(self.source.report(drawn))
            saes = {name: t.finish(states[name]) for name, t in self.trainers.items()}
            wait_for_groups(self.shards, interrupts, self.out)
            on_first(self.shards, lambda: compare(self.out, [*self.configs]))
        return saes

    def start(self, resume: bool) -> dict[str, TrainState]:
        """All states at the newest step for which every SAE has an intact checkpoint. If there is
        none, because other groups trained them before, each is at the newest of its own; so is one
        that has ended early, in any case."""
        trainers = [*self.trainers.values()]
        outs = [trainer.config.out for trainer in trainers]
        begun = on_first(
            self.group, lambda: [resume and (out / "config.json").exists() for out in outs]
        )
        resumed = [trainer for trainer, has in zip(trainers, begun, strict=True) if has]
        found = iter(latest(resumed) if resumed else [])
        checkpoints = [next(found) if has else None for has in begun]
        states = map(Trainer.start, trainers, begun, checkpoints)
        return dict(zip(self.trainers, states, strict=True))

    def loop(
        self, states: dict[str, TrainState], logs: dict[str, Log], interrupts: Interrupts
    ) -> None:
        """Take every batch to every SAE that has not had it yet and has not ended."""
        # Of the runs that continue, the one that is furthest behind takes the batches.
        runs = sorted(
            ((self.trainers[name], state) for name, state in states.items()),
            key=lambda run: (run[0].ended(run[1]), run[1].step),
        )
        trainer, state = runs[0]
        step, steps, every = state.step, trainer.plan.steps, trainer.config.log_every
        shared = [stacks({n: self.trainers[n] for n in names}, states) for names in self.sites]
        bar = progress_bar("sweep", "step", steps, step, shown=self.progress)
        with trainer.batches(state, self.source) as batches, bar:
            while left := [run for run in runs if not run[0].ended(run[1])]:
                batch = take_together(left, batches, interrupts, self.out, step)
                due = {
                    name
                    for name, own in states.items()
                    if own.step == step and not self.trainers[name].ended(own)
                }
                for names, stacked in zip(self.sites, shared, strict=True):
                    if here := [name for name in names if name in due]:
                        self.advance(here, stacked, batch, states, logs)
                step += 1
                bar.update()
                if step % every == 0 or step == steps:
                    lines = {name: log.last["fvu"] for name, log in logs.items() if log.last}
                    best = min(lines, key=lambda name: lines[name])
                    text = f"best FVU {lines[best]:.4f} ({printable(best, 60)})"
                    bar.set_postfix_str(text)
                    if not shows_bars():
                        trainer.say(f"step {step}/{steps}  {text}")

    @property
    def sites(self) -> list[list[str]]:
        """The names of the SAEs that are trained on the same columns of the data."""
        found: dict[tuple[str, ...], list[str]] = {}
        for name, trainer in self.trainers.items():
            found.setdefault(trainer.config.hookpoints, []).append(name)
        return [*found.values()]

    def advance(
        self,
        names: list[str],
        shared: list[Stack],
        batch: Batch,
        states: dict[str, TrainState],
        logs: dict[str, Log],
    ) -> None:
        """Take a batch to these SAEs of a site."""
        first, codes = self.trainers[names[0]], dict[str, Codes]()
        if isinstance(self.source, Stream) and first.config.stream is not None:
            x = self.source.part(batch.x, first.config.hookpoints)
            batch = batch._replace(x=x)
        batch, start = first.standardized(batch, states[names[0]]), time.perf_counter()
        for stack in shared:
            if not stack.states.keys().isdisjoint(names):
                codes |= stack.encode(batch.x)
        # Also for SAEs that take no step: a GEMM with other rows may round differently, and which
        # SAEs take a step together depends on where the sweep was resumed.
        share = (time.perf_counter() - start) / max(len(codes), 1)
        codes = {name: own for name, own in codes.items() if name in names}
        for name in names:
            start = time.perf_counter() - (share if name in codes else 0.0)
            one, log = self.trainers[name], logs[name]
            try:
                one.advance(states[name], batch, log, start, codes.pop(name, None))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error


def check_together(configs: dict[str, TrainConfig]) -> None:
    """ValueError unless SAEs can be trained in one sweep."""
    if not configs:
        raise ValueError("a sweep needs at least one SAE")
    first, *others = configs.values()
    for name in SHARED:
        for other in others:
            one, two = shared(first, name), shared(other, name)
            if one != two:
                raise ValueError(f"all SAEs of a sweep must share {name}, got {one} and {two}")


def check_groups(saes: int, processes: int, group: int) -> None:
    """ValueError unless each group of so many processes has an SAE to train."""
    if saes * group < processes:
        sizes = (n for n in range(group, processes + 1) if processes % n == 0)
        enough = next(n for n in sizes if saes * n >= processes)
        raise ValueError(
            f"{saes} SAEs are too few for {processes // group} groups of processes: --mesh "
            f"latent={enough} lets {enough} processes train each SAE, and uses all {processes}"
        )


def shared(config: TrainConfig, name: str) -> Any:
    """A setting that the SAEs of a sweep share; of a stream, all but the hookpoint."""
    value = getattr(config, name)
    return dataclasses.replace(value, hookpoint="any") if name == "stream" and value else value


def begin(out: Path, configs: dict[str, TrainConfig]) -> None:
    """Write sweep.json to a folder that holds nothing yet; ValueError if it does, and for several
    SAEs with one checkpoint each: killed while saving, no step would remain that all have."""
    if len(configs) > 1 and (kept := next(iter(configs.values())).keep_checkpoints) < 2:
        raise ValueError(f"a sweep must keep 2 checkpoints or more, got keep_checkpoints = {kept}")
    if (out / "sweep.json").exists():
        raise ValueError(
            f"{out} already holds a sweep: add --resume to continue it, or choose another --out"
        )
    if any(not path.name.startswith(".") for path in out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no sweep: choose another --out")
    runs = {name: to_dict(resolved(config)) for name, config in configs.items()}
    document = {"format": FORMAT, "version": __version__, "runs": runs}
    write_json(out / "sweep.json", document)


def stored_sweep(out: Path) -> dict[str, TrainConfig]:
    """The configs of the sweep in a folder, by name; ValueError if there is none or it
    is damaged."""
    path = out / "sweep.json"
    if not path.exists():
        raise ValueError(f"{out} holds no sweep to resume: {path} does not exist")
    document = read_json(path)
    parts = document if isinstance(document, dict) else {}
    runs, by = parts.get("runs"), written_by(parts.get("version"))
    if parts.get("format") != FORMAT or not isinstance(runs, dict) or not runs:
        raise ValueError(f"{path} is not the record of a {FORMAT} folder{by}")
    for name in runs:
        if Path(name).name != name or name in ("", ".."):
            raise ValueError(f"{path}: {shown(name)} is not the name of a folder{by}")
    try:
        return {name: read_config(run, f"{path}: {shown(name)}") for name, run in runs.items()}
    except ValueError as error:
        raise ValueError(f"{error}{by}") from None
