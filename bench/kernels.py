"""Times each op at a shape, against the machine's roof, eager PyTorch and torch.compile.

examples:
  python -m bench kernels --op decode --backward
      forward and gradients of decode at the default shape, against eager PyTorch
  python -m bench kernels --shape 8192,4096,131072,64 --dtype bf16 --against torch compile
      every op at N = 8192 tokens, D = 4096 wide, F = 131072 latents, K = 64 active
  python -m bench kernels --op encode_topk --sweep F --plot encode.png
      time against the number of latents, with the roof
  python -m bench kernels --ncu squared_error --shape A
      one launch after warm-up; prints the Nsight Compute command that profiles it

shapes: N,D,F,K; a is 4096,384,4096,32 and A is 8192,4096,131072,64 (all are in bench/problem.py)

indices: latents fire equally often (uniform), by Zipf's law (zipf), or one on every token (hot)

columns: median time (min to max); GB/s and TFLOP/s, of the least bytes and FLOPs that the op needs;
fraction of the roof (a copy or a GEMM measured in the same run); each baseline's time as a multiple
of fastsae's; registers and resident CTAs of each Triton kernel; peak memory beyond the arguments.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

import torch
from torch import Tensor

from .clock import free, input_sets, measure, peak_bytes, significant, timed
from .ops import Make, Op, chosen_ops
from .problem import DTYPES, Problem, Spread, check_names, parse_shape, precision
from .record import ROOT, attempt, stamp
from .roofs import Cost, Roofs, measure_roofs

AGAINST = "torch", "compile"

FACTORS = 0.25, 0.5, 1, 2, 4
"""Multiples of a size in a sweep."""


def with_gradients(function: Callable[..., Any], *arguments: Any) -> object:
    """Forward and backward pass; each output is its own gradient."""
    result = function(*arguments)
    outs = result if isinstance(result, tuple) else (result,)
    outs = [out for out in outs if isinstance(out, Tensor) and out.requires_grad]
    leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    return torch.autograd.grad(outs, leaves, [out.detach() for out in outs], allow_unused=True)


def arguments_of(make: Make, p: Problem, backward: bool) -> tuple:
    """Arguments of one call; for a backward pass, floating-point tensors require gradients."""
    return tuple(
        a.requires_grad_() if backward and isinstance(a, Tensor) and a.is_floating_point() else a
        for a in make(p)
    )


def op_row(op: Op, p: Problem, roofs: Roofs, backward: bool, against: tuple) -> dict[str, Any]:
    """Time, cost and roof of an op, and the times of its baselines."""
    torch.manual_seed(0)
    free()
    most = 1 if p.dry else 64 if p.device.type == "cuda" else 4
    sets = input_sets(partial(arguments_of, op.make, p, backward), most)
    cost = op.cost(p, int(backward), *sets[0])
    run = partial(with_gradients, op.run) if backward else op.run
    with launched_kernels() as kernels:
        row = measure(run, sets, p.device, dry=p.dry)
    row |= roofline(op, p, row["ms"]["median"], cost, roofs) | {"backward": backward}
    peak = None if p.dry else peak_bytes(lambda: run(*sets[0]), p.device)
    row |= {"peak MB": peak and significant(peak / 2**20), "kernels": resources(kernels)}
    if op.torch_make is not None and against:
        del sets
        free()
        sets = input_sets(partial(arguments_of, op.torch_make, p, backward), most)
    for name in against:
        other = torch.compile(op.torch, dynamic=False) if name == "compile" else op.torch
        other = partial(with_gradients, other) if backward else other
        row[name] = attempt(partial(measure, other, sets, p.device, 80, dry=p.dry))
        if "ms" in row[name]:
            row[name]["ratio"] = significant(row[name]["ms"]["median"] / row["ms"]["median"])
    return row


def roofline(op: Op, p: Problem, ms: float, cost: Cost, roofs: Roofs) -> dict[str, Any]:
    """The rates that an op reached in this time, and the fraction of the roof."""
    roof = roofs.ms(cost)
    row: dict[str, Any] = {"op": op.function, "variant": op.variant, "dtype": precision(p)}
    row |= {"shape": {"N": p.N, "D": p.D, "F": p.F, "K": p.K}, "indices": p.spread}
    row |= {"bytes": cost.bytes, "GB/s": significant(cost.bytes / ms / 1e6)}
    row |= {"flops": cost.flops, "TFLOP/s": significant(cost.flops / ms / 1e9), "rate": cost.rate}
    row |= {"roof ms": significant(roof), "of roof": significant(roof / ms)}
    return row | {"gathered GB/s": significant(cost.gathered / ms / 1e6)} if cost.gathered else row


@contextmanager
def launched_kernels() -> Iterator[dict[str, Any]]:
    """Collects the compiled Triton kernels that are launched inside, by name; none on a CPU."""
    found: dict[str, Any] = {}
    if not torch.cuda.is_available():
        yield found
        return
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def noted(kernel: Any, *arguments: Any, **options: Any) -> Any:
        found[kernel.__name__] = run(kernel, *arguments, **options)
        return found[kernel.__name__]

    with patch.object(JITFunction, "run", noted):
        yield found


def resources(kernels: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Registers, spills, shared memory and resident CTAs per multiprocessor of each kernel."""
    sys.path.append(str(ROOT / "tests" / "compile"))
    found = {}
    for name, kernel in kernels.items():
        from table import resident_ctas  # pyright: ignore[reportMissingImports]

        used, (major, _) = kernel.metadata, torch.cuda.get_device_capability()
        ctas = resident_ctas(10 * major, kernel.n_regs, used.num_warps, used.shared)
        row = {"registers": kernel.n_regs, "spilled": kernel.n_spills}
        found[name] = row | {"shared": used.shared, "CTAs per SM": ctas}
    return found


def line(row: dict[str, Any]) -> str:
    """A row as one line of text."""
    if "ms" not in row:
        return row["error"][:90]
    text = "{median:9.3f} ms ({min:.3f} to {max:.3f})".format(**row["ms"])
    text += f" {row['GB/s']:8} GB/s {row['TFLOP/s']:8} TFLOP/s {row['of roof'] or 0:7.1%} of roof"
    for name in AGAINST:
        if other := row.get(name):
            text += f"  {name} " + (f"{other['ratio']}x" if "ms" in other else other["error"][:40])
    for kernel, used in row["kernels"].items():
        text += f"  {kernel} {used['registers']} registers, {used['CTAs per SM']} CTAs/SM"
    text += "" if row["peak MB"] is None else f"  {row['peak MB']} MB"
    return text + "  UNVERIFIED" * ("unverified" in row)


# --- the command ----------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--op", nargs="+", metavar="OP", help="ops to time (default: all)")
    add("--shape", help="a-d, A-D, or N,D,F,K (default: a; on a GPU A)")
    add("--dtype", choices=DTYPES, help="dtype of the inputs (default: fp32; on a GPU bf16)")
    add("--backward", action="store_true", help="time forward and backward together")
    baselines = "baselines to time (default: torch)"
    add("--against", nargs="*", choices=AGAINST, default=["torch"], help=baselines)
    add("--indices", default="zipf", help="how latents fire: uniform, zipf or hot (default: zipf)")
    add("--sweep", choices=list("NDFK"), help="repeat at 1/4 to 4 times this size of the shape")
    add("--json", type=Path, help="write the rows, the machine and the versions to this file")
    add("--plot", type=Path, help="plot the times of a --sweep and the roof to this file")
    add("--ncu", metavar="OP", help="launch an op once, for Nsight Compute")


def problems_of(arguments: argparse.Namespace) -> list[Problem]:
    """The problem to time, or all those of a sweep."""
    check_names("indices", [arguments.indices], get_args(Spread))
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", "bf16") if gpu else ("cpu", "fp32")
    name, letter = arguments.shape or ("A" if gpu else "a"), arguments.sweep
    about = torch.device(device), DTYPES[arguments.dtype or dtype], arguments.indices
    p = Problem(name, *parse_shape(name), *about)
    if letter is None:
        return [p]
    sizes = sorted({max(1, round(getattr(p, letter) * factor)) for factor in FACTORS})
    swept = [p._replace(name=f"{letter}={size}", **{letter: size}) for size in sizes]
    return [q for q in swept if q.K <= q.F]


def bench(arguments: argparse.Namespace) -> None:
    """Time the chosen ops, print a line for each, and write what was asked for."""
    problems, backward = problems_of(arguments), arguments.backward
    if arguments.ncu is not None:
        return launch_once(chosen_ops([arguments.ncu], backward)[0], problems[0], backward)
    ops = chosen_ops(arguments.op, backward)
    if arguments.plot is not None and (not arguments.sweep or len(ops) > 1):
        raise ValueError("--plot shows one op over a --sweep: select the op with --op")
    roofs = measure_roofs(problems[0], {"fp32", precision(problems[0])})
    rates = ", ".join(f"{n} {rate / 1e12:.4g} TFLOP/s" for n, rate in roofs.rates.items())
    print(f"roof: copy {roofs.bandwidth / 1e9:.4g} GB/s, {rates}", flush=True)
    rows = []
    for op in ops:
        for p in problems:
            work = partial(op_row, op, p, roofs, backward, tuple(arguments.against))
            rows.append({"name": op.name, "problem": p.name, **attempt(work)})
            print(f"{p.name:10} {op.name:32} {line(rows[-1])}", flush=True)
    if arguments.json is not None:
        found = {"stamp": stamp(problems[0].device.type), "roof": roofs._asdict(), "rows": rows}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.plot is not None:
        from .plot import plot_sweep

        plot_sweep(rows, arguments.sweep, arguments.plot)
    return None


def launch_once(op: Op, p: Problem, backward: bool) -> None:
    """Print the profiler's command, then call the op once under the profiler, after warm-up."""
    ncu = "ncu --set full --profile-from-start off --clock-control none -o "
    print(ncu + shlex.join([op.function, sys.executable, "-m", "bench", *sys.argv[1:]]), flush=True)
    run = partial(with_gradients, op.run) if backward else op.run
    sets = [arguments_of(op.make, p, backward)]
    timed(run, sets, p.device, 2, False)
    with torch.cuda.profiler.profile() if p.device.type == "cuda" else nullcontext():
        (watch,) = timed(run, sets, p.device, 1, False)
    print(f"{op.name}: {watch.ms():.3f} ms")
