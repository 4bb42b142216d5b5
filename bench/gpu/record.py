"""The results so far, in a file that is written after every row."""

import faulthandler
import hashlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

from bench.common import said, stamp

from .clock import NO_ROOM, attempt

NO_TIME = "no time left"
NOT_RUN = NO_ROOM, NO_TIME
"""Errors that say nothing of what was to run."""

LOST = 11
"""Exit code of a process whose GPU context is gone."""

PATIENCE = 60
"""Seconds after which a row is taken to hang."""

LAST, END = 440, 455
"""Seconds since the start after which no row begins, and none goes on."""


def gpu_stamp(device: torch.device, commit: str | None) -> dict[str, Any]:
    """The machine, the versions and the sources that a result belongs to."""
    found = stamp() | ({"commit": commit} if commit else {})
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "driver": said("nvidia-smi --query-gpu=driver_version --format=csv,noheader"),
            "cuda": torch.version.cuda,
        }
    else:
        found |= {"gpu": "rehearsal", "capability": "none"}
    date = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return found | {"triton": triton.__version__, "date": date, "sources": sources()}


def sources() -> str:
    """A digest of the code, for a machine without git."""
    root, digest = Path(__file__).parents[2], hashlib.sha256()
    for folder in ("bench", "fastsae", "kernels"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


class Record:
    """Parts of rows: a row is measured once, and is an error if its process died with it."""

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        since: float,
        again: bool,
        commit: str | None = None,
    ):
        self.device, self.since = device, since
        self.stamp = gpu_stamp(device, commit)
        slug = re.sub(r"[^a-z0-9]+", "-", f"gpu-{self.stamp['gpu']}".lower()).strip("-")
        self.path = folder / f"{slug}.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.parts: dict[str, Any] = {}
        if self.path.exists():
            self.parts = json.loads(self.path.read_text())
        running = self.parts.pop("running", None)
        if again and running:
            part, key = running
            self.rows(part)[key] = {"error": "its process died"}
            self.say(f"{part}: {key}: its process died")

    def age(self) -> float:
        """Seconds since the start."""
        return time.time() - self.since

    def begin(self, part: str, again: bool, seconds: float = LAST) -> None:
        """Start a part anew, unless the process was started again in the midst of it.

        It begins no row after so many seconds."""
        if not again or self.parts.get(part, {}).get("since") != self.since:
            until = min(self.age() + seconds, LAST)
            new = {"since": self.since, "stamp": self.stamp, "until": round(until, 1), "rows": {}}
            self.parts[part] = new
        self.save()

    def end(self, part: str) -> None:
        self.parts[part]["ended"] = round(self.age(), 1)
        self.save()

    def rows(self, part: str) -> dict[str, Any]:
        """Of this run."""
        found = self.parts.get(part, {})
        return found["rows"] if found.get("since") == self.since else {}

    def save(self) -> None:
        fresh = self.path.with_suffix(".part")
        fresh.write_text(json.dumps(self.parts, indent=1, allow_nan=False) + "\n")
        fresh.replace(self.path)

    def say(self, text: str) -> None:
        print(f"[{self.age():5.0f} s] {text}", flush=True)

    def put(self, part: str, key: str, row: dict[str, Any]) -> dict[str, Any]:
        self.rows(part)[key] = without_nan(row)
        self.save()
        return self.rows(part)[key]

    def row(self, part: str, key: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row that work returns, unless it is there already or no time is left."""
        if key in self.rows(part):
            return self.rows(part)[key]
        if self.device.type == "cuda" and self.age() > self.parts[part]["until"]:
            return self.put(part, key, {"error": NO_TIME})
        self.parts["running"] = part, key
        self.save()
        faulthandler.dump_traceback_later(self.patience(), exit=True)
        row = attempt(work)
        faulthandler.cancel_dump_traceback_later()
        del self.parts["running"]
        row = self.put(part, key, row)
        if "error" in row:
            self.leave_if_lost()
        return row

    def patience(self) -> float:
        if self.device.type == "cpu":
            return 10 * PATIENCE
        return max(1, min(PATIENCE, END - self.age()))

    def leave_if_lost(self) -> None:
        """A GPU context that met a bad access answers nothing but that: only a new one helps."""
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError as problem:
                self.say(f"the GPU context is lost: {str(problem).splitlines()[0]}")
                sys.stdout.flush()
                os._exit(LOST)

    def checks(self) -> dict[str, dict[str, Any]]:
        return self.rows("checks") | self.rows("more checks")

    def failed(self) -> dict[str, dict[str, Any]]:
        """The checks that did not pass."""
        rows = self.checks().items()
        return {key: row for key, row in rows if row.get("error", NO_TIME) not in NOT_RUN}

    def unfit(self, *groups: str) -> str:
        """Why the ops of these groups are not to be timed: nothing if their checks have passed."""
        failed = {group_of(key) for key in self.failed()} & {*groups}
        if failed:
            return f"failed its check: {', '.join(sorted(failed))}"
        rows = self.checks().items()
        passed = {group_of(key) for key, row in rows if "error" not in row}
        cut = {group_of(key) for key, row in rows if row.get("error") == NO_TIME}
        missing = {*groups} - (passed - cut)
        return f"not checked: {', '.join(sorted(missing))}" if missing else ""


def group_of(key: str) -> str:
    return key.split(": ")[0]


def without_nan(row: Any) -> Any:
    """NaN, which JSON has not, as None."""
    if isinstance(row, dict):
        return {key: without_nan(value) for key, value in row.items()}
    return None if isinstance(row, float) and not math.isfinite(row) else row
