"""python -m bench step | quality | gpu"""

import argparse
import sys

from .gpu import guard


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description="fastsae's benchmarks")
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("step", help="a training step against dense PyTorch and the floor")
    step.add_argument("--shapes", nargs="+", choices=list("abcd"), default=list("abcd"))
    step.add_argument("--rounds", type=int, default=7)
    quality = commands.add_parser("quality", help="held-out FVU against a dense trainer")
    quality.add_argument("--steps", type=int, default=600)
    quality.add_argument("--ways", nargs="+", help="which of them, by their names in the results")
    gpu = commands.add_parser("gpu", help="on a GPU: checks, every kernel, the training step")
    guard.add_arguments(gpu)
    arguments = parser.parse_args()
    if arguments.command == "step":
        from .step import bench

        bench(arguments.shapes, arguments.rounds)
    elif arguments.command == "quality":
        from .quality import WAYS, bench

        bench(arguments.steps, arguments.ways or list(WAYS))
    elif arguments.since is None:
        sys.exit(guard.guarded(arguments))
    else:
        from .gpu.run import bench

        sys.exit(bench(arguments))


if __name__ == "__main__":
    main()
