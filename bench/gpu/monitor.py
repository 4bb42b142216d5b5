"""Clocks, power and temperature of the GPU while it works, as nvidia-smi reads them."""

import subprocess
import threading
import time
from statistics import median
from typing import Any

QUERIES = {"clocks.sm": "SM MHz", "clocks.mem": "memory MHz", "power.draw": "W"}
QUERIES |= {"temperature.gpu": "C"}


class Monitor:
    """Reads five times a second, in a process of its own; without nvidia-smi, nothing."""

    def __init__(self):
        self.samples: list[tuple[float, list[float]]] = []
        command = ["nvidia-smi", f"--query-gpu={','.join(QUERIES)}", "-lms", "200"]
        command.append("--format=csv,noheader,nounits")
        try:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        except OSError:
            self.process = None
        else:
            threading.Thread(target=self.read, daemon=True).start()

    def read(self) -> None:
        assert self.process is not None and self.process.stdout is not None
        for line in self.process.stdout:
            try:
                numbers = [float(word) for word in line.split(",")]
            except ValueError:  # [N/A]
                continue
            self.samples.append((time.time(), numbers))

    def since(self, start: float) -> dict[str, Any]:
        """The medians from a time on, and the most watts."""
        rows = [numbers for at, numbers in self.samples if at > start]
        if not rows:
            return {}
        columns = dict(zip(QUERIES.values(), zip(*rows, strict=True), strict=True))
        return {name: median(found) for name, found in columns.items()} | {
            "most W": max(columns["W"])
        }

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
