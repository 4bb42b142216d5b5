"""A race of training steps and short training runs against the other trainers of SAEs.

Each contender trains with its library's own loop, on the same batches in the same order, in a
process of its own, so that at most one model is in memory. Steps are timed in rounds, in which all
take turns. The training runs show what those steps are worth: held-out FVU after as many tokens.

All of it runs in one environment:

    pip install -c constraints.txt -e '.[demo,peers]' && pip uninstall torchvision

Without the second command, beside a CPU build of torch, a torchvision that one of them pulls in
keeps transformers from being imported.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What can be chosen of a race."""
    parser.add_argument("--shapes", nargs="+", help="of a to d, on a GPU A to D (all)")
    parser.add_argument("--rounds", type=int, default=3, help="of timed steps (3; 0 for none)")
    parser.add_argument("--steps", type=int, default=300, help="of training (300; 0 for none)")
    parser.add_argument("--contenders", nargs="+", help="by their names in the results (all)")
    parser.add_argument("--data", type=Path, help="a folder of activations (the demo's)")
