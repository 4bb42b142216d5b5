"""python -m bench step | quality"""

import argparse

from .common import SHAPES


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description="fastsae's benchmarks")
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("step", help="a training step against dense PyTorch and the floor")
    step.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    step.add_argument("--rounds", type=int, default=7)
    quality = commands.add_parser("quality", help="held-out FVU against a dense trainer")
    quality.add_argument("--steps", type=int, default=600)
    arguments = parser.parse_args()
    if arguments.command == "step":
        from .step import bench

        bench(arguments.shapes, arguments.rounds)
    else:
        from .quality import bench

        bench(arguments.steps)


if __name__ == "__main__":
    main()
