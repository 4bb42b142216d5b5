"""Gives a trained ReLU SAE a rational activation (RSAE, arXiv:2606.14990).

Trains a small ReLU SAE on activations made from a known dictionary, then upgrades it: the rational
function is fitted to the SAE's own pre-activations, and everything is fine-tuned, beside the SAE
itself for as long. Prints FVU and L0 of all four on held-out activations: what the rational
activation is worth is the difference between the two that were fine-tuned.
"""

import argparse
from pathlib import Path

from fastsae import TrainConfig, Trainer
from fastsae.data import Synthetic
from fastsae.files import read_json
from fastsae.nn import ReLUConfig
from fastsae.upgrade import UpgradeConfig, upgrade

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=Path, default=Path("runs/rational"))
parser.add_argument("--steps", type=int, default=600, help="of the ReLU SAE's training")
parser.add_argument("--tuning-steps", type=int, default=200)
options = parser.parse_args()

source = Synthetic(d_in=64, n_latents=256, active=4, n_tokens=30_000)
teaching = TrainConfig(
    d_sae=512,
    activation=ReLUConfig(target_l0=6.0),
    steps=options.steps,
    batch_size=1024,
    out=options.out / "relu",
)
teacher = Trainer(teaching, source).fit()

tuning = UpgradeConfig(steps=options.tuning_steps, batch_size=1024, out=options.out / "rational")
upgrade(teacher, source, tuning)

found = read_json(tuning.out / "upgrade.json")
print(f"{found['new_scalars']} new scalars")
for name, row in found["saes"].items():
    print(f"{name:<22} FVU {row['fvu']:.4f}  L0 {row['l0']:.1f}")
