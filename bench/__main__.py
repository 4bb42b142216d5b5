"""python -m bench step | kernels | quality | peers | study | gpu"""

import argparse
import sys
from pathlib import Path

from . import peers
from .gpu import guard


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description="fastsae's benchmarks")
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("step", help="a training step against dense PyTorch and the floor")
    step.add_argument("--shapes", nargs="+", choices=list("abcd"), default=list("abcd"))
    step.add_argument("--rounds", type=int, default=7)
    commands.add_parser("kernels", help="any op: time, roof, PyTorch and torch.compile")
    quality = commands.add_parser("quality", help="held-out FVU against a dense trainer")
    quality.add_argument("--steps", type=int, default=600)
    quality.add_argument("--variants", nargs="+", help="which, by their names in the results")
    peers.add_arguments(commands.add_parser("peers", help="a race against other trainers of SAEs"))
    study = commands.add_parser("study", help="every method on real and planted data, with seeds")
    study.add_argument("--work", type=Path, default=Path("runs/study"), help="folder for the SAEs")
    names = ("MiniLM layer 3", "MiniLM layer 5", "planted")
    study.add_argument("--data", nargs="+", choices=names, help="which data sets")
    study.add_argument("--seeds", nargs="+", type=int)
    study.add_argument("--steps", type=int, help="of training; the default takes about two hours")
    study.add_argument("--tune-steps", type=int, help="of fine-tuning")
    gpu = commands.add_parser("gpu", help="the full GPU benchmark, in under ten minutes")
    guard.add_arguments(gpu)
    if sys.argv[1:2] == ["kernels"]:  # the other commands need not wait for torch's import
        from .kernels import add_arguments

        add_arguments(commands.choices["kernels"])
    arguments = parser.parse_args()
    try:
        run(arguments)
    except ValueError as error:  # what was given and what is allowed
        parser.error(str(error))


def run(arguments: argparse.Namespace) -> None:
    if arguments.command == "step":
        from .step import bench

        bench(arguments.shapes, arguments.rounds)
    elif arguments.command == "kernels":
        from .kernels import bench

        bench(arguments)
    elif arguments.command == "quality":
        from .quality import CONTENDERS, bench

        bench(arguments.steps, arguments.variants or list(CONTENDERS))
    elif arguments.command == "peers":
        from .peers.race import bench, chosen

        sizes, names = chosen(arguments.shapes), arguments.contenders
        print(bench(sizes, arguments.rounds, arguments.steps, names, arguments.data))
    elif arguments.command == "study":
        from .study.plan import Scale
        from .study.run import bench

        given = {"steps": arguments.steps, "tune_steps": arguments.tune_steps}
        scale = Scale(**{name: value for name, value in given.items() if value is not None})
        bench(arguments.work, scale, arguments.data, arguments.seeds)
    elif arguments.since is None:
        sys.exit(guard.guarded(arguments))
    else:
        from .gpu.run import bench

        sys.exit(bench(arguments))


if __name__ == "__main__":
    main()
