"""What a GPU is doing, read through NVML."""

from typing import Any

import torch


class GpuMeter:
    """Memory, utilisation and power of the GPU in use; nothing on a CPU."""

    def __init__(self, device: torch.device):
        self._nvml: Any = None
        if device.type == "cuda":
            import pynvml

            pynvml.nvmlInit()
            uuid = torch.cuda.get_device_properties(device).uuid
            self._nvml = pynvml
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")

    def read(self) -> dict[str, float]:
        """`gpu_memory_gb`, `gpu_utilisation` (0 to 1) and `gpu_watts`, or {}."""
        if self._nvml is None:
            return {}
        memory = self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used
        busy = self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu
        power = self._nvml.nvmlDeviceGetPowerUsage(self._handle)
        return {
            "gpu_memory_gb": memory / 1e9,
            "gpu_utilisation": busy / 100,
            "gpu_watts": power / 1e3,
        }
