"""Predicts a run's memory and disk space from its shapes.

What a process keeps (weights, moments, copies, counters) is known to the byte. What initialization,
a step and the end of the run need is a formula of the tensors that exist at the same time, with
factors fitted to runs on CPUs: `python -m bench plan` compares the two.
Sizes: N tokens, D widths, F latents of this process, K active latents per token.
"""

from typing import NamedTuple

import torch

from fastsae.data.ordinary import SAMPLE_TOKENS
from fastsae_kernels._launch import buffer_bytes, rows_at_a_time
from fastsae_kernels.product import cpu_product

from .workload import Workload

FLOAT, INT, LOW = 4, 8, 2
"""Bytes of a number in fp32, int64 and bf16."""

# `bench plan` checks LOADED, and SCATTERED and SELECTED or, with candidates in bfloat16,
# SCATTERED_COPIES and PROVED: its runs need most in a step, and no latent is dead. Other factors
# were fitted once, to runs that need most at their start or end or have dead latents; no benchmark
# checks them.

COPIES, COVARIANCES, BESIDES = 8, 6, 40_000_000
"""Of evaluated tokens and of their covariances in float64 that exist at the same time, and bytes of
all else on a CPU (fitted)."""

LOADED = 5.4
"""Batches that a predicted peak counts: those that the loader and the step hold, and what checking
one takes (fitted). Other threads cannot use what the loader's thread frees."""

SCATTERED, SCATTERED_MOST = 0.75, 64_000_000
"""Fraction of the pre-activations' memory that is added to it, and its limit in bytes (fitted):
smaller tensors split the blocks that were freed in the last step, which are then too small for the
next pre-activations."""

SELECTED = 12_000_000
"""Bytes that selecting from fp32 pre-activations takes on a CPU (fitted)."""

SCATTERED_COPIES, PROVED = 1.4, 4.0
"""For candidates in bf16: what counts instead of 1 + SCATTERED, of pre-activations and the copies
of their operands; and batches whose memory candidates and their proofs take (both fitted)."""

REVIVED = 10
"""Copies of a batch that the aux-k loss of a few dead latents takes (fitted)."""

INITIALIZED, SAMPLES = 3, 4
"""Copies of the weights, and of the sample of the data, during initialization (fitted)."""


LOWER_BOUND = (
    "memory of the autograd step is a lower bound: its dense pre-activations are not modeled"
)
"""What is said wherever the memory of such a step is shown."""


class Memory(NamedTuple):
    """Bytes on one device, or in one process on a CPU."""

    state: dict[str, int]
    """What is there during all steps."""
    step: dict[str, int]
    """What a step needs on top."""
    start: dict[str, int]
    """What initialization needs, before there are moments."""
    end: dict[str, int]
    """What exporting and evaluating the SAE needs, when there are no moments any more."""
    held: int
    """The batches among `step` that surely exist at the same time; not fitted."""

    @property
    def kept(self) -> int:
        return sum(self.state.values())

    @property
    def certain(self) -> int:
        """A lower bound of the peak that no fitted constant is part of."""
        return self.kept + self.held

    @property
    def peak(self) -> int:
        """The most at any time."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, int]:
        """What adds up to the peak."""
        phases = self.state | self.step, self.start, self.end
        return max(phases, key=lambda phase: sum(phase.values()))


def state_bytes(w: Workload) -> dict[str, int]:
    """What a process keeps during the whole run, to the byte but for a few scalars."""
    F, entries = w.own_latents, w.entries
    biases = F + w.d_out
    first = (LOW if w.low_moments else FLOAT) * entries
    second = FLOAT * 2 * F if w.row_second else first
    found = {
        "weights": FLOAT * (entries + biases),
        "Adam's moments": first + second + 2 * FLOAT * biases,
        "low-precision copies": copy_bytes(w),
        "averaged weights": FLOAT * (entries + biases) * w.ema,
        "counters": (INT + (w.window > 1) * 4) * F,
    }
    return {name: size for name, size in found.items() if size}


def copy_bytes(w: Workload) -> int:
    """Copies of weights that GEMMs read."""
    quantized = w.own_latents * (w.d_in + FLOAT) * (w.precision in ("int8", "fp8"))
    return (LOW * w.entries * w.low_encoder + quantized) * w.fused


def memory_of(w: Workload, gpu_bytes: int | float = 0) -> Memory:
    """The memory of a process; on a GPU, `gpu_bytes` is the GPU's memory, of which the buffer for
    pre-activations is a part."""
    step = {
        "data": data_bytes(w),
        "batches": batch_bytes(w),
        "pre-activations": pre_bytes(w, gpu_bytes),
    }
    if w.auxk and not w.gpu:
        step["aux-k loss"] = REVIVED * FLOAT * w.tokens * w.d_out
    step |= {"codes and errors": code_bytes(w)} if w.fused else {"gradients": gradient_bytes(w)}
    return Memory(state_bytes(w), step, start_bytes(w), end_bytes(w, gpu_bytes), held_bytes(w))


def batch_bytes(w: Workload) -> int:
    """Batches that the loader and the training step are predicted to hold at the same time."""
    return int(FLOAT * w.tokens * w.row_width * (1 if w.gpu else LOADED))


def held_bytes(w: Workload) -> int:
    """The batch that is trained on, and on a CPU this process' part of the next one, which is
    loaded meanwhile."""
    tokens = w.tokens + (0 if w.gpu else w.tokens // w.axes.data)
    return FLOAT * tokens * w.row_width


def data_bytes(w: Workload) -> int:
    """The window of stored data that batches are drawn from, which no GPU holds."""
    return 0 if w.gpu else w.loaded


def pre_bytes(w: Workload, gpu_bytes: int | float) -> int:
    """The chunk of pre-activations, what selects from it, and copies of its operands in bf16."""
    rows = w.tokens // w.axes.data
    if w.gpu:
        budget = max(512 << 20, int(gpu_bytes) // 32)
        return min(budget, (LOW if w.low_encoder else FLOAT) * rows * w.own_latents)
    x = torch.empty(rows, 0, dtype=torch.bfloat16 if w.bf16_candidates else torch.float32)
    chunk = rows_at_a_time(x, w.own_latents, cpu_product().tokens)
    size = min(buffer_bytes(x.device), x.itemsize * chunk * w.own_latents)
    if w.bf16_candidates:
        copies = LOW * (w.own_latents + rows) * w.d_in
        return int(SCATTERED_COPIES * (size + copies) + PROVED * FLOAT * rows * w.row_width)
    return size + min(int(SCATTERED * size), SCATTERED_MOST) + SELECTED


def code_bytes(w: Workload) -> int:
    """Of a fused step: centered tokens and errors, codes and their order by latent."""
    wide = LOW if w.gpu and w.low_encoder else FLOAT
    entries = w.tokens * min(w.active, w.own_latents)
    # values, indices, dots; sorted entries, tokens, latents; weights of both gradients
    order = entries * (2 * FLOAT + INT + 2 * INT + 2 * 4 + 2 * FLOAT)
    return w.tokens * (wide * w.d_in + (wide + FLOAT) * w.d_out) + order


def gradient_bytes(w: Workload) -> int:
    """Of a step through autograd: gradients of weights, and what Adam makes of one of them. Its
    dense pre-activations [N, F] and their gradients are left out: LOWER_BOUND says so."""
    weights = FLOAT * w.entries
    return weights + weights // 2 + 4 * FLOAT * w.tokens * (w.d_in + w.d_out)


def start_bytes(w: Workload) -> dict[str, int]:
    """Initialization, which is on a CPU."""
    if w.gpu:
        return {}
    weights = state_bytes(w)["weights"]
    sample = SAMPLES * FLOAT * SAMPLE_TOKENS * w.row_width
    return {"weights": weights, "initialization": (INITIALIZED - 1) * weights + sample}


def end_bytes(w: Workload, gpu_bytes: int | float) -> dict[str, int]:
    """The weights, with what SAELens' file is written from or, after that, what evaluation needs.
    The loader's memory is not released."""
    width = w.d_out
    evaluation = COPIES * INT * w.evaluated * width + COVARIANCES * INT * width**2
    phases = {
        "export to SAELens": FLOAT * w.own_latents * w.d_in * (not w.gpu),
        "evaluation": evaluation + pre_bytes(w, gpu_bytes) + BESIDES * (not w.gpu),
    }
    last = max(phases, key=phases.__getitem__)
    return {
        "weights": state_bytes(w)["weights"],
        "last batches": batch_bytes(w) * (not w.gpu),
        last: phases[last],
    }


def disk_bytes(w: Workload) -> dict[str, int]:
    """What the run directory holds at most, of all processes."""
    whole = Workload(**{**vars(w), "axes": type(w.axes)()})
    kept = state_bytes(whole)
    checkpoint = sum(size for name, size in kept.items() if name != "low-precision copies")
    sae = kept["weights"]
    lines = 400 * max(w.steps // 10, 1)
    return {
        f"{w.checkpoints} checkpoints and one being written": (w.checkpoints + 1) * checkpoint,
        "SAE": sae,
        "SAE for SAELens": sae * (w.axes.latent == 1),
        "metrics": lines,
    }
