"""Command line of the benchmarks: `python -m bench COMMAND --help` explains each of them."""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from importlib import import_module

COMMANDS = {
    "step": ("bench.step", "time a training step on the CPU against dense PyTorch and a floor"),
    "plan": ("bench.plan", "compare planned with measured memory and time of CPU runs"),
    "kernels": ("bench.kernels", "time any op against the roof, PyTorch and torch.compile"),
    "peers": ("bench.peers.race", "compare step time and error with other SAE trainers"),
    "accelerate": (
        "bench.peers.accelerate",
        "compare other libraries' training steps before and after accelerate",
    ),
    "programs": (
        "bench.peers.programs",
        "compare other libraries' training programs before and after accelerate",
    ),
    "mixing": ("bench.mixing", "compare sizes of the buffer that mixes a stream's documents"),
    "study": ("bench.study.run", "compare the error of every method on real and synthetic data"),
    "scaling": ("bench.scaling", "simulate many GPUs; or measure the memory of many processes"),
    "gpu": ("bench.gpu.guard", "run the full GPU benchmark in under eight minutes"),
}
"""Module of each command (it defines `add_arguments` and `bench`), and what the command does."""


def main() -> None:
    parser = ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, formatter_class=RawDescriptionHelpFormatter)
        if sys.argv[1:2] == [name]:  # a GPU machine may lack what the other commands import
            chosen = import_module(module)
            command.description = chosen.__doc__
            chosen.add_arguments(command)
    arguments = parser.parse_args()
    module, _ = COMMANDS[arguments.command]
    try:
        sys.exit(import_module(module).bench(arguments))
    except ValueError as error:  # it says what was given and what is allowed
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, f"{arguments.command} was interrupted\n")


if __name__ == "__main__":
    main()
