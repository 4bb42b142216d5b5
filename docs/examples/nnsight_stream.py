"""Train an SAE on the activations of a model that nnsight runs.

A `Producer` traces the model over batches of tokens; the stream mixes its rows. A small GPT-2 with
random weights and random tokens stand in for yours. Prints FVU and L0 on held-out sequences. Needs
nnsight 0.8.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from nnsight import NNsight
from transformers import GPT2Config, GPT2LMHeadModel

from fastsae import TrainConfig, Trainer
from fastsae.data import Contexts, Group, Stream
from fastsae.evals import reconstruction
from fastsae.nn import TopKConfig


class NNsightProducer:
    """Rows [d_model] that a module of a model returns, for batches of tokens [sequences, length];
    every 20th batch is held out. A place is the number of batches before it."""

    def __init__(self, model: NNsight, module: str, batches: list[torch.Tensor]):
        self.model, self.module, self.batches = model, module, batches
        self.widths = {module: model.config.hidden_size}
        self.fingerprint = f"gpt2-random-0 {len(batches)}"  # of what determines the rows

    def groups(self, start=(), part="train") -> Iterator[Group]:
        (first,) = start or (0,)
        for number, tokens in enumerate(self.batches[first:], first):
            heldout = number % 20 == 19
            if part not in ("both", "heldout" if heldout else "train"):
                continue
            with torch.no_grad(), self.model.trace(tokens) as tracer:
                hidden = self.model.get(self.module).output.save()
                tracer.stop()  # later layers are not needed
            sequences, positions = torch.ones_like(tokens).nonzero().T
            documents = sequences + number * len(tokens)
            contexts = Contexts(tokens.flatten(), positions, documents)
            yield Group((hidden.flatten(0, -2),), contexts, (number + 1,), heldout)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=Path, default=Path("runs/nnsight"))
parser.add_argument("--batches", type=int, default=100, help="number of batches of 16 sequences")
parser.add_argument("--steps", type=int, default=300)
options = parser.parse_args()

torch.manual_seed(0)
settings = {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": 32, "vocab_size": 1000}
model = NNsight(GPT2LMHeadModel(GPT2Config(**settings, bos_token_id=0, eos_token_id=0)).eval())
batches = [*torch.randint(1000, (options.batches, 16, 32))]
stream = Stream(NNsightProducer(model, "transformer.h.1", batches), buffer_tokens=16_384)

config = TrainConfig(
    d_sae=512, activation=TopKConfig(k=8), batch_size=512, steps=options.steps, out=options.out
)
found = reconstruction(Trainer(config, stream).fit(), stream.heldout)
print(f"FVU {found.fvu:.4f}, L0 {found.l0:.1f} on {found.tokens} tokens; see {config.out}")
