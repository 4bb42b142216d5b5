"""GPUs that a run can be planned for, with their data sheets' numbers.

Rates that a run reaches are fractions of these: those that an H200 reached in a copy and a bf16
GEMM, and for fp8 and the L2 assumed ones. Prices are examples, to be replaced by your own.
"""

from typing import NamedTuple

from .gpu_step import Rates


class Gpu(NamedTuple):
    """A GPU as its vendor describes it."""

    title: str
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes per second of its memory."""
    bf16: float
    """Dense FLOP/s of tensor cores in bf16, with sums in fp32."""
    fp8: float
    """The same in fp8; 0 without it."""
    price: float
    """US dollars per hour: an example as of PRICED, not an offer."""
    source: str
    """Where the first four numbers are from."""

    @property
    def rates(self) -> Rates:
        """What a run is assumed to reach."""
        memory = REACHED_BY_COPY * self.bandwidth
        l2 = L2_PER_COPY * memory
        return Rates(memory, l2, REACHED_BY_BF16 * self.bf16, REACHED_BY_FP8 * self.fp8)


REACHED_BY_COPY, REACHED_BY_BF16 = 4.3 / 4.8, 780 / 989.5
"""Measured on an H200, as a fraction of its data sheet."""

REACHED_BY_FP8, L2_PER_COPY = 1300 / 1979, 6.5 / 4.3
"""Assumed, of every GPU as of an H200."""

PRICED = "2025"
"""When the prices were typical of rented GPUs on demand, per GPU; they differ a lot and change."""

# bf16 and fp8 are half of what the data sheets give with sparsity.
GPUS = {
    "b200": Gpu(
        "B200", 180e9, 7.7e12, 2250e12, 4500e12, 5.0, "NVIDIA DGX B200 data sheet, per GPU"
    ),
    "h200": Gpu("H200 SXM", 141e9, 4.8e12, 989.5e12, 1979e12, 3.5, "NVIDIA H200 data sheet"),
    "h100": Gpu("H100 SXM", 80e9, 3.35e12, 989.5e12, 1979e12, 2.5, "NVIDIA H100 data sheet"),
    "a100-80": Gpu("A100 80 GB SXM", 80e9, 2.039e12, 312e12, 0, 1.6, "NVIDIA A100 data sheet"),
    "a100-40": Gpu("A100 40 GB SXM", 40e9, 1.555e12, 312e12, 0, 1.3, "NVIDIA A100 data sheet"),
    "l40s": Gpu("L40S", 48e9, 0.864e12, 362e12, 733e12, 0.9, "NVIDIA L40S data sheet"),
    "l4": Gpu("L4", 24e9, 0.3e12, 121e12, 242e12, 0.5, "NVIDIA L4 data sheet"),
    "rtx4090": Gpu(
        "RTX 4090", 24e9, 1.008e12, 165.2e12, 330.3e12, 0.4, "NVIDIA Ada architecture whitepaper"
    ),
}
"""By the name that --gpu takes, the fastest first."""

RESERVED = 0.75e9
"""Bytes of a GPU that its driver, the CUDA context and libraries take."""


def gpu_named(name: str) -> Gpu:
    """ValueError lists the GPUs there are."""
    known = name.lower().replace(" ", "").replace("_", "-")
    if known not in GPUS:
        raise ValueError(f"gpu must be one of {', '.join(GPUS)}, got {name!r}")
    return GPUS[known]


def gpu_like(device_name: str) -> Gpu | None:
    """The GPU in the table that a device's name, such as NVIDIA H200, belongs to, if any."""
    words = device_name.lower().replace("-", " ").split()
    wanted = {name: ({*name.split("-")} if name != "rtx4090" else {"rtx", "4090"}) for name in GPUS}
    wanted |= {"a100-80": {"a100", "80gb"}, "a100-40": {"a100", "40gb"}}
    return next((GPUS[name] for name, parts in wanted.items() if parts <= {*words}), None)
