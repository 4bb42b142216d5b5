"""python -m bench step | kernels | peers | study | gpu"""

import argparse
import sys
from importlib import import_module

COMMANDS = {
    "step": ("bench.step", "a training step against dense PyTorch and the floor"),
    "kernels": ("bench.kernels", "any op: time, roof, PyTorch and torch.compile"),
    "peers": ("bench.peers.race", "a race against other trainers of SAEs"),
    "study": ("bench.study.run", "every method on real and planted data, with seeds"),
    "gpu": ("bench.gpu.guard", "the full GPU benchmark, in under eight minutes"),
}
"""The module of each, with its `add_arguments` and `bench`, and what it measures."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description="fastsae's benchmarks")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        if sys.argv[1:2] == [name]:  # a GPU machine may lack what the others import
            import_module(module).add_arguments(command)
    arguments = parser.parse_args()
    module, _ = COMMANDS[arguments.command]
    try:
        sys.exit(import_module(module).bench(arguments))
    except ValueError as error:  # what was given and what is allowed
        parser.error(str(error))


if __name__ == "__main__":
    main()
