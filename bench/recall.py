"""Measures the recall of low-precision candidates: how many true active entries they contain.

    fastsae train --out runs/sae --steps 600 --batch-size 1024
    python -m bench.recall runs/sae --name "minilm layer 3"

The encoder of a trained TopK SAE and held-out tokens are rounded as in a low-precision GEMM. Its
m k largest pre-activations, for several m, are compared with the k largest in fp32. Results go to
bench/results/recall-cpu.json.

Outlier dimensions are the hardest case. To plant three in activations x [N, d_in]:

    x[:, :3] *= 100
    np.save("planted.npy", x)

and train with `--data planted.npy`; likewise with rows of `fastsae.data.Synthetic`.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastsae
from fastsae.cli.eval import eval_data
from fastsae.files import read_json
from fastsae.nn import TopK
from fastsae.train import stored_config
from fastsae_kernels.float8 import quantize_rows
from fastsae_kernels.int8 import balance, int8_product, quantize_int8

from .record import write

MARGINS = (1.0, 1.25, 1.5, 1.75, 2.0, 4.0)
TOKENS = 512  # per chunk, all of whose pre-activations are in memory


def rounded(x: Tensor, format: str) -> Tensor:
    """The rows of a matrix as a GEMM in bf16 or fp8 reads them."""
    if format == "bf16":
        return x.bfloat16().float()
    rows, scale = quantize_rows(x)
    return rows.float() * scale[:, None]


@torch.no_grad()
def recall(x: Tensor, W: Tensor, b: Tensor, k: int) -> dict[str, Any]:
    """Fraction of the active entries of centered tokens x among the candidates, per format."""
    exact = [torch.addmm(b, rows, W.t()).topk(k) for rows in x.split(TOKENS)]
    fired = torch.cat([indices for _, indices in exact]).unique()
    found: dict[str, Any] = {"latents active": len(fired)}
    for format in ("bf16", "int8", "fp8"):
        W_low = rounded(W, format)
        missed, error = dict.fromkeys(MARGINS, 0), []
        for rows, (values, indices) in zip(x.split(TOKENS), exact, strict=True):
            if format == "int8":
                h = int8_product(rows, quantize_int8(W, balance(x)), b).t()
            else:
                h = torch.addmm(b, rounded(rows, format), W_low.t()).bfloat16()
            error.append(h.gather(1, indices) - values)
            candidates = h.topk(math.ceil(max(MARGINS) * k)).indices
            for margin in MARGINS:
                kept = candidates[:, None, : math.ceil(margin * k)] == indices[:, :, None]
                missed[margin] += int((~kept.any(2) & (values > 0)).sum())
        active = sum(int((values > 0).sum()) for values, _ in exact)
        shares = {f"{margin:g} k": 1 - n / active for margin, n in missed.items()}
        noise = float(torch.cat(error).std() / torch.addmm(b, x[:TOKENS], W.t()).std())
        found[format] = {"noise / std of h": round(noise, 4), "active": active, **shares}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.recall", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", type=Path, help="directory of a `fastsae train` run")
    parser.add_argument("--data", type=Path, help="activations to measure on (default: the run's)")
    parser.add_argument("--name", help="name of the data in the results (default: the run's)")
    parser.add_argument("--tokens", type=int, default=16_384, help="maximum (default: 16384)")
    args = parser.parse_args()
    sae, config = fastsae.load(args.run), stored_config(args.run)
    if not isinstance(sae.activation, TopK) or sae.activation.signed:
        parser.error(f"recall needs a TopK SAE, got {sae.activation.cfg} in {args.run}")
    x, k = eval_data(args.run, args.data).sample(args.tokens), sae.activation.cfg.k
    about = {"data": args.name or args.run.name, "d_in": sae.d_in, "d_sae": sae.d_sae, "k": k}
    about["steps"] = read_json(args.run / "config.json")["plan"]["steps"]
    about |= {"batch_size": config.batch_size, "tokens": len(x)}
    result = recall(sae.center(x), sae.W_enc.detach(), sae.b_enc.detach(), k)
    print(about, *result.items(), sep="\n", flush=True)
    write("recall-cpu", {f"{about['data']}, {sae.d_sae} latents": {**about, **result}})


if __name__ == "__main__":
    main()
