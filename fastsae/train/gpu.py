"""What a GPU is doing, read through NVML."""

import contextlib
import warnings
from typing import Any

import torch


class GpuMeter:
    """Memory, utilization and power of the GPU in use; nothing on a CPU."""

    def __init__(self, device: torch.device):
        self._nvml: Any = None
        if device.type == "cuda":
            import pynvml

            try:
                pynvml.nvmlInit()
                uuid = torch.cuda.get_device_properties(device).uuid
                self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
                self._nvml = pynvml
            except pynvml.NVMLError as error:
                warnings.warn(f"GPU metrics are not logged: {error}", stacklevel=2)

    def read(self) -> dict[str, float]:
        """`gpu_memory_gb`, `gpu_utilization` (0 to 1) and `gpu_watts`, or {}."""
        if self._nvml is None:
            return {}
        nvml, handle = self._nvml, self._handle
        readings = {
            "gpu_memory_gb": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used / 1e9,
            "gpu_utilization": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
            "gpu_watts": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
        }
        found = {}
        for name, reading in readings.items():
            with contextlib.suppress(nvml.NVMLError):  # some GPUs and containers hide some
                found[name] = reading()
        return found
