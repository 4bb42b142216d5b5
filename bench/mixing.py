"""Measures how an SAE depends on the size of a stream's buffer, which mixes documents.

Stored activations are read in their order, as a model would produce them, and pass through buffers
of several sizes; `all` shuffles the whole data instead. The data need contexts and a held-out part:
a directory from `fastsae harvest`, by default 2 million tokens of MiniLM over the whole Python
standard library, tests included. Results go to bench/results/mixing-{amd,intel,cuda}.json; the same
command continues an interrupted one.
"""

import argparse
import hashlib
import json
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from bench import record
from fastsae.data import ActivationShards, Group, HarvestConfig, Place, Stream, harvest
from fastsae.data.demo import model_folder
from fastsae.data.mixing import effective_number
from fastsae.data.producer import Part
from fastsae.train import TrainConfig, Trainer

TOKENS = 2_000_000
"""Of the default data."""
SIZES = ["8192", "131072", "1048576", "all"]
GROUP = 1024
"""Rows of a group."""


@dataclass
class Stored:
    """A producer of stored rows, in their order."""

    shards: ActivationShards

    @property
    def widths(self) -> dict[str, int]:
        return {"stored": self.shards.d_in}

    @property
    def fingerprint(self) -> str:
        return self.shards.fingerprint

    def groups(self, start: Place = (), part: Part = "train") -> Iterator[Group]:
        for first in range(start[0] if start else 0, self.shards.n_tokens, GROUP):
            rows = torch.arange(first, min(first + GROUP, self.shards.n_tokens))
            x = self.shards.rows(rows).half()
            yield Group((x,), self.shards.contexts(rows), (first + GROUP,))


class OfStored(Stream):
    """Their stream, with their held-out part."""

    def __init__(self, shards: ActivationShards, buffer_tokens: int):
        super().__init__(Stored(shards), buffer_tokens)
        self.shards = shards

    @property
    def heldout(self) -> ActivationShards | None:
        return self.shards.heldout


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", type=Path, help="directory of activations (default: 2 million of MiniLM)")
    add("--buffers", nargs="+", default=SIZES, help=f"tokens, or all (default: {' '.join(SIZES)})")
    add("--steps", type=int, default=480, help="of 4096 tokens (default: 480, one pass)")
    add("--seeds", type=int, default=3, help="seeds of the runs (default: 3)")


def bench(arguments: argparse.Namespace) -> None:
    """Train with each buffer and seed; print the table."""
    data, steps = arguments.data, arguments.steps
    shards = ActivationShards(data) if data else library()
    if shards.heldout is None or not shards.has_contexts:
        raise ValueError(f"{shards.path} must have contexts and a held-out part")
    name = f"mixing-{record.machine()}"
    path, key = record.RESULTS / f"{name}.json", f"{shards.fingerprint}, {steps} steps"
    known = json.loads(path.read_text()).get(key, {}) if path.exists() else {}
    runs: dict[str, list[dict[str, float]]] = known.get("runs", {})
    about = {"data": shards.path.name, "tokens": shards.n_tokens, **(shards.harvest or {})}
    about = {n: about[n] for n in ("data", "tokens", "hookpoint", "context_length") if n in about}
    for seed in range(arguments.seeds):
        for size in arguments.buffers:
            done = runs.setdefault(size, [])
            if len(done) <= seed:
                done.append(run(shards, size, steps, seed))
                print(f"{size}, seed {seed}: {done[-1]}", flush=True)
                record.write(name, {key: {**about, "runs": runs}})
    print(table(runs))


def library() -> ActivationShards:
    """The default data, harvested once. The demo's are a third of that, too few to read once."""
    folder = Path(sysconfig.get_path("stdlib"))
    names = (path.relative_to(folder) for path in folder.rglob("*.py") if readable(path))
    names = [name.as_posix() for name in names if "site-packages" not in name.parts]
    names.sort(key=lambda name: hashlib.sha256(name.encode()).digest())  # mixes packages
    config = HarvestConfig(
        model=str(model_folder()),
        hookpoint="encoder.layer.2",
        out=Path.home() / ".cache" / "fastsae" / "mixing",
        text=tuple(str(folder / name) for name in names),
        context_length=128,
        max_tokens=TOKENS,
        max_document_tokens=2048,
        heldout_fraction=0.08,
        dtype="float16",
    )
    return harvest(config)


def readable(path: Path) -> bool:
    """Whether it is Python source in the encoding that it declares: some tests are not."""
    try:
        with tokenize.open(path) as file:
            file.read()
    except (SyntaxError, ValueError):
        return False
    return True


def run(shards: ActivationShards, size: str, steps: int, seed: int) -> dict[str, float]:
    """The quality of one SAE, and the effective number of documents in the last batches."""
    source = shards if size == "all" else OfStored(shards, int(size))
    with TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        Trainer(TrainConfig(steps=steps, seed=seed, out=out, log_every=50), source).fit()
        summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
        last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    documents = last.get("documents_per_batch") or of_shuffled(shards, seed)
    found = {"fvu": summary["fvu"], "dead": summary["dead_fraction"], "documents": documents}
    return {name: round(value, 6) for name, value in found.items()}


def of_shuffled(shards: ActivationShards, seed: int) -> float:
    with shards.batches(4096, seed) as batches:
        documents = shards.contexts(torch.from_numpy(next(batches).rows)).documents
    return effective_number(documents.numpy().astype(np.int64))


def table(runs: dict[str, list[dict[str, float]]]) -> str:
    titles = ["buffer (tokens)", "documents per batch", "held-out FVU", "never active"]
    rows = []
    for size, found in runs.items():
        fvu = [one["fvu"] for one in found]
        spread = f" ± {stdev(fvu):.4f}" if len(fvu) > 1 else ""
        documents, dead = (mean(one[key] for one in found) for key in ("documents", "dead"))
        rows.append([size, f"{documents:.0f}", f"{mean(fvu):.4f}{spread}", f"{dead:.2%}"])
    return record.markdown(titles, rows)
