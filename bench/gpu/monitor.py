"""Records the GPU's clocks, power and temperature during the benchmark, with nvidia-smi."""

import subprocess
import threading
import time
from statistics import median

QUERIES = {"clocks.sm": "SM MHz", "clocks.mem": "memory MHz", "power.draw": "W"}
QUERIES |= {"temperature.gpu": "C"}


class Monitor:
    """Takes five samples a second in the background; none without nvidia-smi."""

    def __init__(self):
        self.samples: list[tuple[float, list[float]]] = []
        command = ["nvidia-smi", f"--query-gpu={','.join(QUERIES)}", "-lms", "200"]
        command.append("--format=csv,noheader,nounits")
        try:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        except OSError:
            self.process = None
        threading.Thread(target=self.read, daemon=True).start()

    def read(self) -> None:
        for line in (self.process and self.process.stdout) or ():
            try:
                self.samples.append((time.time(), [float(number) for number in line.split(",")]))
            except ValueError:  # [N/A]
                continue

    def since(self, start: float) -> dict[str, float]:
        """Medians of the samples since a time."""
        rows = [numbers for at, numbers in self.samples if at > start]
        columns = zip(*rows, strict=True)
        return {name: median(found) for name, found in zip(QUERIES.values(), columns, strict=False)}

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
