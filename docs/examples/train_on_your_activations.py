"""Train an SAE on the hidden activations of any torch model.

A forward hook collects the outputs of a module, `ShardWriter` writes them to a directory with a
held-out part, and `Trainer` trains a TopK SAE on them. A small network with random weights stands
in for your model. Prints the run's log, and FVU and L0 on the held-out part.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from fastsae import ActivationShards, TrainConfig, Trainer
from fastsae.data import ShardWriter
from fastsae.evals import reconstruction
from fastsae.nn import TopKConfig

VOCABULARY, WIDTH, LENGTH = 1000, 64, 32


def outputs(model: nn.Module, module: nn.Module, batches: list[Tensor]) -> Iterator[Tensor]:
    """The module's output for each batch, [tokens, width]."""
    seen = []
    handle = module.register_forward_hook(lambda _, arguments, output: seen.append(output))
    try:
        for batch in batches:
            with torch.no_grad():
                model(batch)
            yield seen.pop().flatten(0, -2)
    finally:
        handle.remove()


def store(activations: Iterator[Tensor], batches: list[Tensor], folder: Path) -> None:
    """Write rows, each with its token, position and document (here: sequence)."""
    writer = ShardWriter(folder, WIDTH)
    for number, (rows, tokens) in enumerate(zip(activations, batches, strict=True)):
        sequences, positions = torch.ones_like(tokens).nonzero().T
        writer.append(rows, tokens.flatten(), positions, sequences + number * len(tokens))
    writer.finish()


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=Path, default=Path("runs/yours"))
parser.add_argument("--batches", type=int, default=64, help="number of batches of 32 sequences")
parser.add_argument("--steps", type=int, default=300)
options = parser.parse_args()

layers = [nn.TransformerEncoderLayer(WIDTH, 4, 128, batch_first=True) for _ in range(3)]
model = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), *layers).eval()
for name, count in {"": options.batches, "heldout": options.batches // 8 or 1}.items():
    batches = list(torch.randint(VOCABULARY, (count, 32, LENGTH)))
    store(outputs(model, layers[1], batches), batches, options.out / "activations" / name)

source = ActivationShards(options.out / "activations")
settings = {"d_sae": 512, "activation": TopKConfig(k=8), "batch_size": 512}
config = TrainConfig(**settings, steps=options.steps, out=options.out / "run")
found = reconstruction(Trainer(config, source).fit(), source.heldout or source)
print(f"FVU {found.fvu:.4f}, L0 {found.l0:.1f} on {found.tokens} tokens; see {config.out}")
