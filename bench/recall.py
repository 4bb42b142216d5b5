"""Recall of low-precision candidates: how many of the true active entries they contain.

An SAE is trained, its encoder and held-out tokens are rounded as a low-precision GEMM takes them,
and the best m k entries of that product are compared with the k entries of the product in fp32.

    python -m bench.recall                                  the demo: MiniLM, 4096 latents
    python -m bench.recall --d-sae 131072 --steps 100       a larger dictionary
    python -m bench.recall --data FOLDER --name smollm2     activations harvested from a model
    python -m bench.recall --planted 100                    three dimensions times 100
    python -m bench.recall --synthetic                      from a known dictionary
"""

import argparse
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsae.data import ActivationShards, ActivationSource, Synthetic, demo_shards
from fastsae.losses import Objective
from fastsae.nn import TopKConfig
from fastsae.train import Optimizer, TrainConfig, Trainer
from fastsae_kernels.float8 import SMALLEST_SCALE, quantize_rows

from .record import write

MARGINS = (1.0, 1.25, 1.5, 1.75, 2.0, 4.0)
TOKENS = 512  # of which all pre-activations exist at a time


def rounded(x: Tensor, format: str) -> Tensor:
    """As a GEMM of that format takes the rows of a matrix."""
    if format == "bf16":
        return x.bfloat16().float()
    if format == "fp8":
        rows, scale = quantize_rows(x)
        return rows.float() * scale[:, None]
    scale = (x.abs().amax(1, keepdim=True) / 127).clamp_min(SMALLEST_SCALE)
    return (x / scale).round() * scale


def formats(x: Tensor, W: Tensor) -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    """What each does to tokens, and the encoder that it multiplies with."""
    balance = (x.abs().amax(0) / W.abs().amax(0)).sqrt()  # SmoothQuant's, arXiv:2211.10438
    plans = {name: (name, torch.ones_like(balance)) for name in ("bf16", "int8", "fp8")}
    plans["fp8, columns balanced"] = ("fp8", balance)
    return {
        name: (lambda rows, f=f, s=s: rounded(rows / s, f), rounded(W * s, f))
        for name, (f, s) in plans.items()
    }


@torch.no_grad()
def recall(x: Tensor, W: Tensor, b: Tensor, k: int) -> dict[str, Any]:
    """Share of the active entries of centered tokens x among the candidates, per format."""
    exact = [torch.addmm(b, rows, W.t()).topk(k) for rows in x.split(TOKENS)]
    found: dict[str, Any] = {
        "latents active": len(torch.cat([indices for _, indices in exact]).unique())
    }
    for name, (low, W_low) in formats(x, W).items():
        missed, error = dict.fromkeys(MARGINS, 0), []
        for rows, (values, indices) in zip(x.split(TOKENS), exact, strict=True):
            h = torch.addmm(b, low(rows), W_low.t()).bfloat16()  # what a GPU's product returns
            error.append(h.gather(1, indices) - values)
            candidates = h.topk(math.ceil(max(MARGINS) * k)).indices
            for margin in MARGINS:
                kept = candidates[:, None, : math.ceil(margin * k)] == indices[:, :, None]
                missed[margin] += int((~kept.any(2) & (values > 0)).sum())
        active = sum(int((values > 0).sum()) for values, _ in exact)
        shares = {f"{margin:g} k": 1 - n / active for margin, n in missed.items()}
        noise = float(torch.cat(error).std() / torch.addmm(b, x[:TOKENS], W.t()).std())
        found[name] = {"noise / std of h": round(noise, 4), "active": active, **shares}
    return found


def sources(args: argparse.Namespace, folder: Path) -> tuple[ActivationSource, ActivationSource]:
    """What to train on and what to count on."""
    if args.synthetic:
        source = Synthetic(d_in=512, n_latents=32_768, active=args.k, noise=0.02)
    else:
        source = ActivationShards(args.data) if args.data else demo_shards()
    heldout = source.heldout or source
    if args.planted == 1:
        return source, heldout
    for name, part in {"train": source, "heldout": heldout}.items():
        rows = part.sample(part.n_tokens)
        rows[:, :3] *= args.planted
        np.save(folder / f"{name}.npy", rows.numpy())
    return ActivationShards(folder / "train.npy"), ActivationShards(folder / "heldout.npy")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.recall", description=__doc__)
    parser.add_argument("--data", type=Path, help="activations (default: the demo's)")
    parser.add_argument("--name", default="minilm layer 3", help="of the data, in the results")
    parser.add_argument("--synthetic", action="store_true", help="512 dims, 32768 known latents")
    parser.add_argument("--planted", type=float, default=1.0, help="factor on three dimensions")
    parser.add_argument("--tokens", type=int, default=16_384, help="held-out tokens, at most")
    for name, default in (("d-sae", 4096), ("k", 32), ("steps", 600), ("batch-size", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source, heldout = sources(args, Path(folder))
        how: dict[str, Any] = {"encoder_precision": "bf16", "optimizer": Optimizer(adam_window=8)}
        how["objective"] = Objective(auxk_coef=0.0)  # whose GEMM over the dead takes most time
        how |= {n: getattr(args, n) for n in ("d_sae", "steps", "batch_size")}
        config = TrainConfig(activation=TopKConfig(k=args.k), out=Path(folder) / "run", **how)
        sae = Trainer(config, source).fit()
        x = heldout.sample(args.tokens)
    result = recall(sae.centre(x), sae.W_enc.detach(), sae.b_enc.detach(), args.k)
    data = "synthetic, 512 dims, 32768 latents" if args.synthetic else args.name
    data += f", three dimensions x {args.planted:g}" if args.planted != 1 else ""
    settings = {n: getattr(args, n) for n in ("d_sae", "k", "steps", "batch_size")}
    about = {"data": data, "d_in": sae.d_in, **settings, "tokens": len(x)}
    print(about, *result.items(), sep="\n", flush=True)
    write("recall-cpu", {f"{data}, {args.d_sae} latents": {**about, **result}})


if __name__ == "__main__":
    main()
