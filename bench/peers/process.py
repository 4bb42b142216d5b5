"""Runs a task in its own process."""

import json
import subprocess
import sys
from dataclasses import asdict
from typing import Any

from .task import Task


def run(task: Task) -> dict[str, Any]:
    """Run a task in its own process; returns the result it prints, or its error."""
    command = [sys.executable, "-m", "bench.peers.contender", json.dumps(asdict(task))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout)
    if done.returncode < 0:
        return {"error": f"killed by signal {-done.returncode}"}
    lines = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"]
    error = next((line for line in reversed(lines) if "Error" in line), lines[-1])[:300]
    hint = " (try: pip uninstall torchvision)" if "torchvision" in done.stderr else ""
    return {"error": error + hint}
