"""Several SAEs trained together on one pass over the same activations.

Each is a run like any other, with a folder of its own under the sweep's, and takes the same batches
in the same order: they are read and shuffled once for all. SAEs for several hookpoints of a stream
take the same tokens. TopK SAEs of one shape and hookpoint share the encoder GEMM, unless they keep
bfloat16 copies.
"""

import dataclasses
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fastsae.checkpoint import list_checkpoints, newest_intact
from fastsae.codes import Codes
from fastsae.config import to_dict
from fastsae.data import Batch, Stream, as_source
from fastsae.files import read_json, shown, write_json
from fastsae.meeting import on_first
from fastsae.memory import keep_freed_memory
from fastsae.nn import SAE
from fastsae.progress import printable, progress_bar, shows_bars
from fastsae.shards import ONE_PROCESS, Shards
from fastsae.version import __version__, written_by

from .comparison import compare
from .config import TrainConfig, read_config
from .describe import describe
from .forecast import check_fits
from .interrupt import Interrupted, Interrupts
from .log import Log
from .run_folder import claimed_run, resolved
from .stacked import Stack, stacks
from .state import TrainState
from .trainer import Trainer

FORMAT = "fastsae.sweep.1"
SHARED = (
    *("data", "stream", "target", "layers", "layer_norm", "max_norm_ratio", "steps"),
    *("batch_size", "device", "checkpoint_every", "keep_checkpoints", "log_every", "eval_every"),
)


class Sweep:
    """Trains the SAEs of several configs and leaves a comparison of them in `out`.

    `out` then holds a run's folder for each, comparison.json and, with matplotlib, comparison.png.
    With `shards`, a `fastsae.distributed.Mesh`, every process trains an equal part of them, each of
    them whole and on its own; process 0 compares them at the end.
    """

    def __init__(
        self,
        configs: dict[str, TrainConfig],
        source: object,
        out: Path,
        progress: bool = True,
        shards: Shards = ONE_PROCESS,
    ):
        """Configs by name; their `out` becomes the folder of that name, and their data come in the
        order of the first one's seed. ValueError unless there are some, and they share SHARED and
        have no patience. Without `progress`, nothing but warnings is shown on stderr."""
        check_together(configs)
        if len(configs) < shards.size:
            raise ValueError(
                f"a sweep in {shards.size} processes needs as many SAEs, got {len(configs)}"
            )
        first = next(iter(configs.values()))
        seed = first.seed if first.data_seed is None else first.data_seed
        self.source = source = as_source(source)
        self.out, self.shards, self.progress = out, shards, progress and shards.rank == 0
        self.configs = {
            name: dataclasses.replace(config, out=out / name, data_seed=seed)
            for name, config in configs.items()
        }
        """Of all SAEs; `trainers` are those of this process."""
        self.trainers: dict[str, Trainer] = {}
        for name in [*configs][shards.rank :: shards.size]:
            own, config = source, self.configs[name]
            if isinstance(source, Stream) and config.stream is not None:
                own = source.select(*config.hookpoints)
            self.trainers[name] = Trainer(config, own, progress=self.progress)
        self.first = next(iter(self.trainers))

    def fit(self, resume: bool = False) -> dict[str, SAE]:
        """Train all to the last step. Raises what `Trainer.fit` does."""
        keep_freed_memory()
        check_fits([trainer.forecast for trainer in self.trainers.values()])
        with claimed_run(self.out, self.shards), ExitStack() as stack:
            if not resume:
                for first, *_ in self.sites:
                    self.trainers[first].standardization()  # a failed start leaves no files
                on_first(self.shards, lambda: begin(self.out, self.configs))
            for trainer in self.trainers.values():
                stack.enter_context(claimed_run(trainer.config.out))
            states = self.start(resume)
            interrupts = stack.enter_context(Interrupts())
            logs = {}
            for name, trainer in self.trainers.items():
                step = states[name].step
                log = Log(trainer.config, trainer.plan.steps, step, shown=False)
                logs[name] = stack.enter_context(log)
                trainer.say(f"{name}: {describe(trainer, states[name].sae)}")
            self.loop(states, logs, interrupts)
            if isinstance(self.source, Stream):
                self.trainers[self.first].say(self.source.report(states[self.first].tokens))
            saes = {name: t.finish(states[name]) for name, t in self.trainers.items()}
            self.shards.all_of(None)  # the others may have more to do
            on_first(self.shards, lambda: compare(self.out, [*self.configs]))
        return saes

    def start(self, resume: bool) -> dict[str, TrainState]:
        """All states at the newest step for which every SAE has an intact checkpoint."""
        outs = {name: trainer.config.out for name, trainer in self.trainers.items()}
        begun = {name: resume and (out / "config.json").exists() for name, out in outs.items()}
        found = None
        if all(begun.values()):
            folders = [out / "checkpoints" for out in outs.values()]
            found = newest_intact(folders)
            if found is None and all(map(list_checkpoints, folders)):
                raise ValueError(
                    f"SAEs in {self.out} have no checkpoint of the same step: resume them in as "
                    f"many processes as before"
                )
        checkpoints = found or [None] * len(outs)
        return {
            name: trainer.start(begun[name], checkpoint)
            for (name, trainer), checkpoint in zip(self.trainers.items(), checkpoints, strict=True)
        }

    def loop(
        self, states: dict[str, TrainState], logs: dict[str, Log], interrupts: Interrupts
    ) -> None:
        """Take every batch to every SAE."""
        trainer, state = self.trainers[self.first], states[self.first]
        steps, every = trainer.plan.steps, trainer.config.log_every
        shared = [stacks({n: self.trainers[n] for n in names}, states) for names in self.sites]
        bar = progress_bar("sweep", "step", steps, state.step, shown=self.progress)
        with trainer.batches(state, self.source) as batches, bar:
            while state.step < steps:
                batch = trainer.take(batches, state, interrupts)
                if batch is not None:
                    for names, stacked in zip(self.sites, shared, strict=True):
                        self.advance(names, stacked, batch, states, logs)
                    bar.update()
                if batch is not None and (state.step % every == 0 or state.step == steps):
                    lines = {name: log.last["fvu"] for name, log in logs.items()}
                    best = min(lines, key=lambda name: lines[name])
                    text = f"best FVU {lines[best]:.4f} ({printable(best, 60)})"
                    bar.set_postfix_str(text)
                    if not shows_bars():
                        trainer.say(f"step {state.step}/{steps}  {text}")
                if interrupts.signum and state.step < steps:
                    for name, one in self.trainers.items():
                        one.save(states[name])
                    raise Interrupted(
                        interrupts.signum,
                        f"stopped at step {state.step} of {steps}, saved; "
                        f"continue with --resume --out {self.out}",
                    )

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
        """Take a batch to the SAEs of a site."""
        first, codes = self.trainers[names[0]], dict[str, Codes]()
        if isinstance(self.source, Stream) and first.config.stream is not None:
            x = self.source.part(batch.x, first.config.hookpoints)
            batch = batch._replace(x=x)
        batch, start = first.standardized(batch, states[names[0]]), time.perf_counter()
        for stack in shared:
            codes |= stack.encode(batch.x)
        share = (time.perf_counter() - start) / max(len(codes), 1)
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
    if any(config.patience is not None for config in configs.values()):
        raise ValueError("patience must be none where several SAEs train on the same tokens")


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
