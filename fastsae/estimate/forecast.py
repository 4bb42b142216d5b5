"""What a run will need: memory, disk, time and money, and what to change if that is too much."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from fastsae.distributed import Axes

from .exchange import network_seconds, received, widest
from .gpu_step import Update, kernel_seconds
from .gpus import GPUS, RESERVED, Gpu
from .memory import LOWER_BOUND, Memory, disk_bytes, memory_of
from .workload import Workload


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where a run is to train."""

    title: str
    memory: int | float
    """Bytes that a process can use; infinite where that is unknown."""
    gpu: Gpu | None = None
    """The GPU in the table; None for a CPU, and for a GPU that the table does not have."""
    price: float | None = None
    """US dollars per hour of all processes together."""
    example: bool = False
    """Whether the price is the table's."""
    here: bool = False
    """Whether it is this machine, which a probe can measure."""

    @classmethod
    def of_gpu(cls, gpu: Gpu, count: int = 1, price: float | None = None) -> "Machine":
        per_hour = count * gpu.price if price is None else price
        memory, example = gpu.memory - RESERVED, price is None
        return cls(title=gpu.title, memory=memory, gpu=gpu, price=per_hour, example=example)


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The needs of a run on a machine."""

    workload: Workload
    machine: Machine
    memory: Memory
    disk: dict[str, int]
    seconds: dict[str, float] | None
    """Of a step, by part; None where it is not known."""
    how: str
    """Where the times are from."""

    @property
    def step_seconds(self) -> float | None:
        return None if self.seconds is None else sum(self.seconds.values())

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.machine.memory

    @property
    def cannot_fit(self) -> bool:
        """Whether even the lower bound exceeds the memory."""
        return self.memory.certain > self.machine.memory

    @property
    def limit(self) -> str | None:
        """The part of a step that takes longest."""
        return max(self.seconds, key=self.seconds.__getitem__) if self.seconds else None


def forecast(
    workload: Workload, machine: Machine, seconds: dict[str, float] | None = None, how: str = ""
) -> Forecast:
    """The forecast; the times of a fused step in bf16 or fp8 on a GPU in the table are predicted,
    if they are not given."""
    modeled = workload.fused and workload.low_encoder
    if seconds is None and machine.gpu is not None and modeled:
        seconds, how = gpu_step_seconds(workload, machine.gpu), "predicted, not measured"
    memory = memory_of(workload, machine.memory if workload.gpu else 0)
    return Forecast(
        workload=workload,
        machine=machine,
        memory=memory,
        disk=disk_bytes(workload),
        seconds=seconds,
        how=how,
    )


def gpu_step_seconds(w: Workload, gpu: Gpu) -> dict[str, float]:
    """Predicted seconds of each part of a fused TopK step on one GPU of a mesh."""
    size = w.tokens, w.d_in, w.latents, w.active
    update = Update(4 if w.low_moments else 8, w.window)
    if w.row_second:
        update = update._replace(moment_bytes=update.moment_bytes / 2)
    parts = kernel_seconds(size, w.axes, w.precision == "fp8", gpu.rates, update)
    if w.axes.size > 1:
        moves = received(size, w.axes, width=widest(w.tokens, w.active, w.axes.latent))
        parts["network"], _, _ = network_seconds(moves, w.axes)
    return parts


# --- advice -----------------------------------------------------------------------------------


def smaller(f: Forecast) -> Iterator[tuple[str, Workload]]:
    """Changes that save memory, with the run that they make, the least intrusive ones first."""
    w = f.workload
    if w.fused and not w.low_moments:
        yield "--adam-moments bf16", (w := replace(w, low_moments=True))
    if w.fused and not w.row_second:
        yield "--adam-second row", (w := replace(w, row_second=True))
    if w.fused and w.gpu:
        for latent in (2, 4, 8, 16, 32, 64):
            axes = Axes(w.axes.data, latent)
            divided = not w.latents % latent and not w.tokens % axes.size
            if latent > w.axes.latent and divided:
                yield f"--mesh {axes}", replace(f.workload, axes=axes)
    for factor in (2, 4, 8):
        if w.tokens // factor >= 512 and not w.tokens // factor % w.axes.size:
            yield (
                f"--batch-size {w.tokens // factor}",
                replace(f.workload, tokens=w.tokens // factor),
            )
    latents = f.workload.latents // 2
    while latents >= max(f.workload.active, 64):
        yield f"--d-sae {latents}", replace(f.workload, latents=latents)
        latents //= 2


def remedies(f: Forecast) -> list[str]:
    """What would make the run fit: the first change of each kind that is enough."""
    found: dict[str, str] = {}
    tried: list[str] = []
    for change, workload in smaller(f):
        kind = change.split(" ")[0]
        other = forecast(workload, f.machine, f.seconds)
        together = kind in ("--adam-moments", "--adam-second")
        tried += [change] * together
        if other.fits and kind not in found and not (together and "--adam-moments" in found):
            text = " ".join(tried) if together else change
            each = f" on each of {workload.axes.size} such GPUs" * (kind == "--mesh")
            found[kind] = f"{text} (needs {gigabytes(other.memory.peak)}{each})"
    cards = sorted(
        (g for g in GPUS.values() if f.workload.gpu and f.memory.peak <= g.memory - RESERVED),
        key=lambda g: g.memory,
    )
    return [*found.values(), *(f"the same on {card.title}" for card in cards[:1])]


def refusal(f: Forecast) -> str:
    """Why the run cannot be, and what would."""
    if f.cannot_fit:
        certain = gigabytes(f.memory.certain)
        need = f"weights, optimizer and batches need at least {certain}"
    else:
        about = "about" if f.workload.fused else "at least"
        need = f"it needs {about} {gigabytes(f.memory.peak)}"
    text = f"does not fit: {need} of the {gigabytes(f.machine.memory)} that {f.machine.title} has"
    if fits := remedies(f):
        text += f"; what would fit: {'; '.join(fits)}"
    return text if f.workload.fused else f"{text}; {LOWER_BOUND}"


ADVICE = {
    "network": "a mesh with fewer processes along latent, or a larger --batch-size, sends less",
    "decode": "a smaller --k reads fewer rows",
    "rescore": "a smaller --k reads fewer candidates",
    "top-k": "time is proportional to --d-sae",
}


def advice(f: Forecast) -> str:
    """The change that helps most, in one line."""
    w = f.workload
    if not f.fits:
        fits = remedies(f)
        return fits[0] if fits else "take fewer latents"
    if f.limit in ("encoder", "encoder GEMM"):
        if w.precision == "fp32" and not w.gpu:
            return "--encoder-precision int8, where the CPU supports it, speeds it up"
        return "it is the only dense operation: its time is proportional to --d-sae"
    if f.limit == "optimizer":
        return cheaper_updates(w)
    return ADVICE.get(f.limit or "", "nothing stands out")


def cheaper_updates(w: Workload) -> str:
    """What makes the optimizer faster, of what the run does not do yet."""
    options = ["--adam-moments bf16"] * (not w.low_moments) + ["--adam-window 8"] * (w.window < 8)
    less = "reads and writes less, " if len(options) == 1 else "read and write less, "
    return (
        f"{' and '.join(options)} {less}" * bool(options)
        + "a larger --batch-size updates less often"
    )


def duration(seconds: float) -> str:
    """The length of a run in a readable unit."""
    for unit, scale in (("hours", 3600), ("minutes", 60)):
        if seconds >= scale:
            return f"{seconds / scale:,.1f} {unit}"
    return f"{seconds:.3g} seconds"


def milliseconds(seconds: float) -> str:
    """A time per step in a readable form."""
    ms = 1e3 * seconds
    return f"{ms:,.0f} ms" if ms >= 100 else f"{ms:.3g} ms"


def gigabytes(size: int | float) -> str:
    """Bytes in a readable unit."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return (
                f"{size / scale:.3g} {unit}"
                if size < 1000 * scale
                else f"{size / scale:,.0f} {unit}"
            )
    return f"{size / 1e3:.3g} kB"
