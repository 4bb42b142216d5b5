"""Estimates of a run's memory, disk space, time and cost, from its shapes."""

from .cpu_step import cpu_step_seconds
from .forecast import (
    Forecast,
    Machine,
    advice,
    duration,
    forecast,
    gigabytes,
    milliseconds,
    refusal,
    remedies,
)
from .gpus import GPUS, PRICED, Gpu, gpu_like, gpu_named
from .memory import LOWER_BOUND, Memory, disk_bytes, memory_of, state_bytes
from .workload import Workload

__all__ = [
    "GPUS",
    "LOWER_BOUND",
    "PRICED",
    "Forecast",
    "Gpu",
    "Machine",
    "Memory",
    "Workload",
    "advice",
    "cpu_step_seconds",
    "disk_bytes",
    "duration",
    "forecast",
    "gigabytes",
    "gpu_like",
    "gpu_named",
    "memory_of",
    "milliseconds",
    "refusal",
    "remedies",
    "state_bytes",
]
