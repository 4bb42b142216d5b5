"""Result files: each result is stamped, and rows are saved one by one to survive a crash."""

import faulthandler
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fastsae.environment import cpu_name, source_commit
from fastsae.files import claimed, write_atomically
from fastsae_kernels.product import has_bf16, processor

from .clock import free

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"

NO_ROOM, NO_TIME = "does not fit", "no time left"

LOST = 11
"""Exit code of a process that lost its CUDA context."""

TIMEOUT = 90
"""Seconds after which a row counts as hung."""

LAST, END = 450, 475
"""Seconds since the start after which no row begins, and none continues: 8 minutes in all."""


# --- the stamp ------------------------------------------------------------------------------


def stamp(device: str = "cpu", commit: str = "") -> dict[str, Any]:
    """Machine, versions and commit of a result."""
    found = {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "bf16_instructions": has_bf16(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit or source_commit(),
    }
    if device == "cuda":
        gpu = torch.cuda.get_device_properties()
        found |= {"gpu": gpu.name, "capability": f"{gpu.major}.{gpu.minor}"}
        found |= {"memory_gb": round(gpu.total_memory / 1e9, 1), "cuda": torch.version.cuda}
        driver = "nvidia-smi --query-gpu=driver_version --format=csv,noheader"
        found["driver"] = shell_output(driver)
    return found


def shell_output(command: str) -> str:
    """The output of a command; empty if it is missing or fails."""
    failed, output = subprocess.getstatusoutput(command)
    return "" if failed else output.strip()


def machine(device: str = "cpu") -> str:
    """The suffix of result files: cuda, or the CPU's vendor, with "-avx2" if it lacks AVX-512."""
    if device == "cuda":
        return device
    maker, instructions = processor()
    return maker.lower() + "-avx2" * (instructions == "avx2")


def write(name: str, results: dict[str, dict[str, Any]], device: str = "cpu") -> Path:
    """Add stamped results to bench/results/NAME.json; other results in it are kept."""
    path = RESULTS / f"{name}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept.update({key: {**stamp(device), **result} for key, result in results.items()})
    write_atomically(path, lambda to: to.write_text(json.dumps(kept, indent=1) + "\n"))
    return path


@contextmanager
def alone() -> Iterator[None]:
    """Holds the results' folder, for a benchmark that keeps its results in memory: two of them
    would overwrite each other's. ValueError if it is held."""
    with claimed(RESULTS) as held:
        if not held:
            raise ValueError(f"a race is writing to {RESULTS}: wait until it has ended")
        yield


def markdown(titles: list[str], rows: Iterable[Iterable[object]]) -> str:
    """A table in Markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


# --- rows that may fail, in a process that may die ------------------------------------------


def attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The row that `work` returns, or one with its error, after freeing its memory."""
    try:
        return work()
    except torch.OutOfMemoryError:
        error = NO_ROOM
    except Exception as problem:  # recorded, so that the other rows are still measured
        lines = str(problem).strip().splitlines() or [""]
        error = f"{type(problem).__name__}: {lines[0][:300]}"
    free()
    return {"error": error}


class Record:
    """Rows of the GPU benchmark by part, in one JSON file that is saved after every row.

    A process that was started again skips rows that were measured, and records an error for the
    row during which the last process died.
    """

    def __init__(self, folder: Path, device: torch.device, since: float, again: bool, commit=""):
        self.device, self.since, self.again = device, since, again
        date = time.strftime("%Y-%m-%d %H:%M:%S %z")
        self.stamp = stamp(device.type, commit) | {"triton": version("triton"), "date": date}
        self.stamp.setdefault("gpu", "dry run")
        slug = re.sub(r"[^a-z0-9]+", "-", f"gpu-{self.stamp['gpu']}".lower()).strip("-")
        self.path = folder / f"{slug}.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.parts: dict[str, Any] = {}
        if self.path.exists():
            self.parts = json.loads(self.path.read_text())
        running = self.parts.pop("running", None)
        if again and running:
            part, key = running
            self.rows(part).setdefault(key, {"error": "its process died"})
            self.log(f"{part}: {key}: its process died")

    def age(self) -> float:
        """Seconds since the start."""
        return time.time() - self.since

    def begin(self, part: str, seconds: float = LAST) -> None:
        """Start a part over, unless this process continues one that died during the part.

        No row begins after `seconds`.
        """
        if not self.again or self.parts.get(part, {}).get("since") != self.since:
            until = min(self.age() + seconds, LAST)
            new = {"since": self.since, "stamp": self.stamp, "until": round(until, 1), "rows": {}}
            self.parts[part] = new
        self.save()

    def end(self, part: str) -> None:
        self.parts[part]["ended"] = round(self.age(), 1)
        self.save()

    def rows(self, part: str) -> dict[str, Any]:
        """Rows of a part that were measured in this run."""
        found = self.parts.get(part, {})
        return found["rows"] if found.get("since") == self.since else {}

    def save(self) -> None:
        fresh = self.path.with_suffix(".part")
        fresh.write_text(json.dumps(self.parts, indent=1, allow_nan=False) + "\n")
        fresh.replace(self.path)

    def log(self, text: str) -> None:
        print(f"[{self.age():5.0f} s] {text}", flush=True)

    def put(self, part: str, key: str, row: dict[str, Any]) -> dict[str, Any]:
        self.rows(part)[key] = without_nan(row)
        self.save()
        return self.rows(part)[key]

    def left(self, part: str) -> float:
        """Seconds until no more rows of a part begin."""
        return self.parts[part]["until"] - self.age()

    def row(
        self, part: str, key: str, work: Callable[[], dict[str, Any]], timeout: float = TIMEOUT
    ) -> dict[str, Any]:
        """The row that `work` returns, unless it was measured already or no time is left."""
        if key in self.rows(part):
            return self.rows(part)[key]
        if self.device.type == "cuda" and self.left(part) < 0:
            return self.put(part, key, {"error": NO_TIME})
        self.parts["running"] = part, key
        self.save()
        if self.device.type == "cuda":
            faulthandler.dump_traceback_later(max(1, min(timeout, END - self.age())), exit=True)
        row = attempt(work)
        faulthandler.cancel_dump_traceback_later()
        del self.parts["running"]
        row = self.put(part, key, row)
        if "error" in row:
            self.exit_if_context_lost()
        return row

    def exit_if_context_lost(self) -> None:
        """Exit if the CUDA context is lost: after an illegal access, only a new process helps."""
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError as problem:
                self.log(f"the CUDA context is lost: {str(problem).splitlines()[0]}")
                sys.stdout.flush()
                os._exit(LOST)


def without_nan(row: Any) -> Any:
    """Replace NaN and Inf, which JSON does not allow, by None."""
    if isinstance(row, dict):
        return {key: without_nan(value) for key, value in row.items()}
    return None if isinstance(row, float) and not math.isfinite(row) else row
