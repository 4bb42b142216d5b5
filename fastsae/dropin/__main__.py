"""Runs a program of SAELens, sparsify or dictionary_learning with accelerated SAEs.

What `python SCRIPT ARGUMENTS` or `python -m MODULE ARGUMENTS` runs, with all SAEs that the library
creates accelerated from the start:

    python -m fastsae.dropin sparsify -m sparsify MODEL DATASET --k 32
    python -m fastsae.dropin sae_lens train.py
    torchrun --nproc_per_node 8 -m fastsae.dropin sparsify -m sparsify MODEL DATASET
"""

import argparse
import sys
from pathlib import Path
from runpy import run_module, run_path

from . import accelerate
from .classes import SUPPORTED


def parser() -> argparse.ArgumentParser:
    parsed = argparse.ArgumentParser(
        "python -m fastsae.dropin",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [-h] [--exact-compat] LIBRARY [-m MODULE | SCRIPT] [ARGUMENTS ...]",
    )
    parsed.add_argument("library", choices=SUPPORTED, help="the library whose SAEs to accelerate")
    parsed.add_argument("program", nargs=argparse.REMAINDER, help="what to run, with its arguments")
    parsed.add_argument("--exact-compat", action="store_true", help="keep sparsify's own gradients")
    return parsed


def main() -> None:
    """Patch the library, then run the program in this process as Python would."""
    given = parser().parse_args()
    is_module = given.program[:1] == ["-m"]
    words = given.program[is_module:]
    if not words:
        parser().error("nothing to run: give a script, or -m and a module")
    try:
        patch = accelerate(given.library, exact_compat=given.exact_compat)
    except ValueError as error:
        parser().error(str(error))
    sys.argv = words
    with patch:
        if is_module:
            run_module(words[0], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = str(Path(words[0]).resolve().parent)  # as for `python SCRIPT`
            run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main()
