"""Train an SAE on the activations of a TransformerLens model as it runs.

A `Producer` runs the model over batches of tokens; the stream mixes its rows. A small model with
random weights and random tokens stand in for yours. Prints FVU and L0 on held-out sequences. Needs
TransformerLens 3.9 or later.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from transformer_lens.model_bridge import TransformerBridge

from fastsae import TrainConfig, Trainer
from fastsae.data import Contexts, Group, Stream
from fastsae.evals import reconstruction
from fastsae.nn import TopKConfig


class LensProducer:
    """Rows at a hook of a model, for batches of tokens [sequences, length]; every 20th batch is
    held out. A place is the number of batches before it."""

    def __init__(self, model: TransformerBridge, hook: str, batches: list[torch.Tensor]):
        self.model, self.hook, self.batches = model, hook, batches
        self.widths = {hook: model.cfg.d_model}
        self.fingerprint = f"{model.cfg.model_name} {len(batches)}"  # of what determines the rows

    def groups(self, start=(), part="train") -> Iterator[Group]:
        (first,) = start or (0,)
        for number, tokens in enumerate(self.batches[first:], first):
            heldout = number % 20 == 19
            if part not in ("both", "heldout" if heldout else "train"):
                continue
            with torch.no_grad():
                _, cache = self.model.run_with_cache(tokens, names_filter=self.hook)
            sequences, positions = torch.ones_like(tokens).nonzero().T
            documents = sequences + number * len(tokens)
            contexts = Contexts(tokens.flatten(), positions, documents)
            yield Group((cache[self.hook].flatten(0, -2),), contexts, (number + 1,), heldout)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=Path, default=Path("runs/lens"))
parser.add_argument("--batches", type=int, default=100, help="number of batches of 16 sequences")
parser.add_argument("--steps", type=int, default=300)
options = parser.parse_args()

torch.manual_seed(0)
settings = {"n_layers": 2, "d_model": 64, "d_head": 16, "n_ctx": 32, "d_vocab": 1000}
model = TransformerBridge.boot_native({**settings, "n_heads": 4, "act_fn": "gelu"})
batches = [*torch.randint(1000, (options.batches, 16, 32))]
stream = Stream(LensProducer(model, "blocks.1.hook_resid_post", batches), buffer_tokens=16_384)

config = TrainConfig(
    d_sae=512, activation=TopKConfig(k=8), batch_size=512, steps=options.steps, out=options.out
)
found = reconstruction(Trainer(config, stream).fit(), stream.heldout)
print(f"FVU {found.fvu:.4f}, L0 {found.l0:.1f} on {found.tokens} tokens; see {config.out}")
