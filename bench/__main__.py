"""python -m bench step | kernels | quality | peers | study | gpu"""

import argparse
import sys
from importlib import import_module
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
    default = "of training (500; all of it takes about two hours)"
    study.add_argument("--steps", type=int, default=500, help=default)
    study.add_argument("--tune-steps", type=int, default=150, help="of fine-tuning (150)")
    gpu = commands.add_parser("gpu", help="the full GPU benchmark, in under eight minutes")
    guard.add_arguments(gpu)
    if sys.argv[1:2] == ["kernels"]:  # the other commands need not wait for torch's import
        import_module("bench.kernels").add_arguments(commands.choices["kernels"])
    arguments = parser.parse_args()
    try:
        run(arguments)
    except ValueError as error:  # what was given and what is allowed
        parser.error(str(error))


def run(a: argparse.Namespace) -> None:
    if a.command == "step":
        import_module("bench.step").bench(a.shapes, a.rounds)
    elif a.command == "kernels":
        import_module("bench.kernels").bench(a)
    elif a.command == "quality":
        import_module("bench.peers.race").quality(a.steps, a.variants)
    elif a.command == "peers":
        race = import_module("bench.peers.race")
        print(race.bench(race.chosen(a.shapes), a.rounds, a.steps, a.contenders, a.data))
    elif a.command == "study":
        scale = import_module("bench.study.plan").Scale(a.steps, a.tune_steps)
        import_module("bench.study.run").bench(a.work, scale, a.data, a.seeds)
    elif a.since is None:
        sys.exit(guard.guarded(a))
    else:
        sys.exit(import_module("bench.gpu.run").bench(a))


if __name__ == "__main__":
    main()
