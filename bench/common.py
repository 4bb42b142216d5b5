"""What every benchmark shares: the shapes, a fair clock, and a stamp of where it ran."""

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"

SHAPES = {  # tokens, d_in, d_sae, k
    "a": (4096, 384, 4096, 32),
    "b": (4096, 768, 12288, 32),
    "c": (4096, 768, 24576, 32),
    "d": (2048, 1024, 65536, 64),
}


def interleaved(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds per call of each run, in turns of half a second, after one uncounted turn.

    Taking turns spreads a change in the machine's speed over all of them; short runs are called
    several times in theirs, as a training loop calls them.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    calls = dict.fromkeys(runs, 1)
    for counted in [False] + [True] * rounds:
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                run()
            took = (time.perf_counter() - start) * 1e3 / calls[name]
            if counted:
                times[name].append(took)
            else:
                calls[name] = max(1, round(500 / took))
    return times


def summary(times: list[float], digits: int = 2) -> dict[str, float]:
    return {
        "median": round(statistics.median(times), digits),
        "min": round(min(times), digits),
        "max": round(max(times), digits),
    }


def peak_megabytes() -> float:
    """Peak resident size of this process so far."""
    status = Path("/proc/self/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def stamp() -> dict[str, Any]:
    """The machine, the versions and the commit that a result belongs to."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "threads": torch.get_num_threads(),
        "bf16_instructions": any("avx512_bf16" in line or "amx_bf16" in line for line in lines),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
    }


def commit() -> str:
    """That of the code, and whether anything but results was changed since."""
    found = said("git describe --always --exclude '*'")
    changed = said("git status --porcelain --untracked-files=no -- ':(top,exclude)bench/results'")
    return f"{found}-dirty" if changed else found or "unknown"


def said(command: str) -> str:
    """What a program prints, or nothing where it is missing or fails."""
    failed, output = subprocess.getstatusoutput(command)
    return "" if failed else output.strip()


def write(name: str, results: dict[str, dict[str, Any]]) -> Path:
    """Put results, each with its stamp, beside the other ones of that file."""
    path = RESULTS / f"{name}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept.update({key: {**stamp(), **result} for key, result in results.items()})
    path.write_text(json.dumps(kept, indent=1) + "\n")
    return path
