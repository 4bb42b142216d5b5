"""Measures what corrections of active latents' values are worth to a trained TopK or AbsTopK SAE.

    fastsae train --activation abstopk --d-sae 1536 --steps 300 --batch-size 1024 --out runs/abs
    python -m bench.corrections runs/abs --name "minilm layer 3, abstopk, k=32"

The SAE is evaluated on the same held-out tokens with several numbers of corrections: its error, how
much more that is than orthogonal matching pursuit leaves with the same decoder, and the time of
encoding. Results go to bench/results/corrections.json.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import fastsae
from bench.study.measure import PURSUIT_TOKENS, pursuit_error, squared_error
from fastsae import SAE
from fastsae.cli.eval import eval_data
from fastsae.data import StoredActivations
from fastsae.evals import reconstruction
from fastsae.nn import TopK

from .record import write

NUMBERS = (0, 1, 2, 4)
ROUNDS, TIMED_TOKENS = 5, 4096


@torch.no_grad()
def corrections(sae: SAE, data: StoredActivations, tokens: int) -> dict[str, Any]:
    """The metrics of the SAE on the first tokens of data by its number of corrections."""
    cfg = sae.activation.cfg
    x, found, encoders = data.sample(TIMED_TOKENS), {}, {}
    few = x[:PURSUIT_TOKENS]
    least = pursuit_error(sae, few)
    for number in NUMBERS:
        sae.activation = replace(cfg, corrections=number).build()
        sae.eval()
        metrics = reconstruction(sae, data, max_tokens=tokens, pc_ranks=())
        gap = squared_error(sae, few) / least - 1
        found[str(number)] = {"fvu": metrics.fvu, "l0": metrics.l0, "pursuit gap": gap}
        encoders[str(number)] = sae.activation
    for _ in range(ROUNDS):  # interleaved; of the process, which others then do not slow down
        for number, sae.activation in encoders.items():
            start = time.process_time()
            sae.encode(x)
            seconds = time.process_time() - start
            found[number]["encode s"] = min(seconds, found[number].get("encode s", seconds))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.corrections", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", type=Path, help="directory of a `fastsae train` run")
    parser.add_argument("--data", type=Path, help="activations to measure on (default: the run's)")
    parser.add_argument("--name", help="name in the results (default: the run's)")
    parser.add_argument("--tokens", type=int, default=26_000, help="maximum (default: 26000)")
    args = parser.parse_args()
    sae = fastsae.load(args.run)
    if not isinstance(sae.activation, TopK) or sae.activation.decodes:
        parser.error(f"corrections need a TopK SAE, got {sae.activation} in {args.run}")
    about = {"d_in": sae.d_in, "d_sae": sae.d_sae, "k": sae.activation.cfg.k}
    result = corrections(sae, eval_data(args.run, args.data), args.tokens)
    print(about, *result.items(), sep="\n", flush=True)
    write("corrections", {args.name or args.run.name: {**about, **result}})


if __name__ == "__main__":
    main()
