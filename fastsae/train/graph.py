"""The fused step as one CUDA graph: its launches are recorded once and replayed by one call.

A step is 80 to 140 launches, which a CPU issues in about a millisecond: longer than a GPU takes for
a small dictionary. Nothing in them changes from step to step but what tensors hold.
"""

import warnings

import torch
from jaxtyping import Float
from torch import Tensor

from fastsae.losses import Objective, TrainingLoss
from fastsae.nn import SAE

from .optim import Adam
from .step import fused_step

EAGER = 2
"""Steps before the recording, in which kernels are compiled and libraries take their memory."""


class CapturedStep:
    """`fused_step` without dead latents, from its third call on replayed on copies of the batches.

    The result is overwritten by the next step. Weights and the optimizer's tensors must stay where
    they are. The graph has memory of its own, as much as an eager step needs. Where recording
    fails, steps stay eager after a warning; if `required`, it is a RuntimeError.
    """

    def __init__(self, sae: SAE, adam: Adam, objective: Objective, required: bool = False):
        self.arguments = sae, adam, objective
        self.required = required
        self.taken = 0
        self.x: Tensor | None = None
        self.graph = torch.cuda.CUDAGraph()

    def __call__(self, x: Float[Tensor, "N d_in"]) -> TrainingLoss:
        """One step, after `Adam.begin_step`; eager for batches of another size than recorded."""
        if self.x is None and self.taken == EAGER:
            self.capture(x)
        if self.x is None or self.x.shape != x.shape or self.x.dtype != x.dtype:
            self.taken += 1
            return self.eager(x)
        self.x.copy_(x)
        self.graph.replay()
        return self.result

    def eager(self, x: Tensor) -> TrainingLoss:
        sae, adam, objective = self.arguments
        return fused_step(sae, adam, x, None, objective)

    def capture(self, x: Tensor) -> None:
        """Record a step on a copy of the batch, without taking it."""
        copy, stream = x.clone(), torch.cuda.current_stream()
        try:
            # Other threads, which load batches, may do what a recording forbids its own.
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                result = self.eager(copy)
        except RuntimeError as error:  # nothing has run: the step is as it was
            torch.cuda.set_stream(stream)  # a recording that ends by an error leaves its own
            if self.required:
                raise
            warnings.warn(f"no CUDA graph, steps are launched one by one: {error}", stacklevel=2)
        else:
            self.x, self.result = copy, result
