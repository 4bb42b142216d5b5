"""Upgrade a trained ReLU SAE to a rational activation (RSAE, arXiv:2606.14990).

Trains a small ReLU SAE on activations from a known dictionary, then upgrades it: fits the rational
function to the SAE's own pre-activations and fine-tunes everything. As a baseline, the original SAE
is fine-tuned for the same number of steps. Prints FVU and L0 of all four on held-out activations.
The gain from the rational activation is the difference between the two fine-tuned SAEs.
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
parser.add_argument("--steps", type=int, default=600, help="training steps of the ReLU SAE")
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
