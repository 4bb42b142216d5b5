"""Speed up a SparseCoder of EleutherAI's sparsify, in place.

Runs two copies of one coder on the same tokens, one of them after `fastsae.accelerate`. Prints how
much their outputs, gradients and active latents differ, and how long a training step (forward,
backward, Adam) takes with each. Steps are interleaved, and run on a GPU if there is one.
"""

import argparse
import copy
import os
import time
from statistics import median

import torch

if not torch.cuda.is_available():
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # otherwise sparsify's decode needs a GPU

from sparsify import SparseCoder, SparseCoderConfig

import fastsae


def timed_step(coder: SparseCoder, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> float:
    """Seconds of one training step."""
    start = time.perf_counter()
    optimizer.zero_grad()
    coder(x).fvu.backward()
    optimizer.step()
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--tokens", type=int, default=2048)
parser.add_argument("--d-in", type=int, default=384)
parser.add_argument("--latents", type=int, default=8192)
parser.add_argument("--k", type=int, default=32)
parser.add_argument("--rounds", type=int, default=5)
options = parser.parse_args()

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
x = torch.randn(options.tokens, options.d_in, device=device)
config = SparseCoderConfig(num_latents=options.latents, k=options.k)
coders = {"sparsify": SparseCoder(options.d_in, config, device)}
coders["accelerated"] = fastsae.accelerate(copy.deepcopy(coders["sparsify"]))

theirs, ours = (coder(x) for coder in coders.values())
for found in (theirs, ours):
    found.fvu.backward()
gradients = [coder.encoder.weight.grad for coder in coders.values()]
same = theirs.latent_indices.sort().values == ours.latent_indices.sort().values
print(f"largest difference of outputs    {(theirs.sae_out - ours.sae_out).abs().max():.1e}")
print(f"largest difference of gradients  {(gradients[0] - gradients[1]).abs().max():.1e}")
print(f"same active latents              {same.float().mean():.4%}")

optimizers = {name: torch.optim.Adam(coder.parameters(), 1e-4) for name, coder in coders.items()}
seconds: dict[str, list[float]] = {name: [] for name in coders}
for _ in range(options.rounds + 1):
    for name, coder in coders.items():
        seconds[name].append(timed_step(coder, optimizers[name], x))
for name, times in seconds.items():
    print(f"{name:<12} {1000 * median(times[1:]):.0f} ms per step")  # the first one is a warmup
