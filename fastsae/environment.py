"""What a run is computed with: versions, the commit of the sources, and the machine."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .version import __version__

ROOT = Path(__file__).parents[1]
"""The checkout, if this is one, and not an installed package."""


def environment(device: torch.device) -> dict[str, str]:
    """Versions, commit and machine, as they are recorded with a run."""
    found = {
        "fastsae": __version__,
        "commit": source_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
    }
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda)}
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def cpu_name() -> str:
    """The model of the processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    models = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor())


def source_commit() -> str:
    """The commit that is checked out, with -dirty if anything but results of benchmarks has changed
    since; unknown outside a checkout."""
    if not (ROOT / ".git").exists():
        return "unknown"
    found = git("describe", "--always", "--exclude", "*")
    tracked = "status", "--porcelain", "--untracked-files=no", "--"
    changed = git(*tracked, ":(top,exclude)bench/results")
    return f"{found}-dirty" if changed else found or "unknown"


def git(*words: str) -> str:
    """The output of git on the checkout; empty if it is missing or fails."""
    try:
        done = subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True)
    except OSError:
        return ""
    return "" if done.returncode else done.stdout.strip()
