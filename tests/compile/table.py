"""Compiles every shipped configuration of every kernel for three GPUs, without a GPU.

    python tests/compile/table.py [--json FILE]

prints what each needs. Run it in a process without TRITON_INTERPRET, under any triton version;
torch and fastsae_kernels must be on the path.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from cases import REAL, cases
from recorder import Launch, recording

TARGETS = 80, 90, 100

REGISTERS, THREADS, MOST_CTAS = 64 << 10, 2048, 32
"""What each streaming multiprocessor (SM) of these GPUs has, whichever of them it is."""

SHARED = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
"""Bytes of shared memory per SM; each resident CTA takes RESERVED of them for the system."""

RESERVED = 1 << 10

TENSOR_CORES = {"tcgen05": r"\btcgen05\.mma", "wgmma": r"\bwgmma\.mma_async", "mma": r"\bmma\.sync"}
"""Instructions as PTX spells them, the best first."""

COLUMNS: dict[str, tuple[str, Callable[[dict], object]]] = {
    "kernel": ("{:22}", lambda row: row["kernel"]),
    "target": ("{:6}", lambda row: f"sm_{row['arch']}"),
    "warps": ("{:>5}", lambda row: row["warps"]),
    "stages": ("{:>6}", lambda row: row["stages"]),
    "registers": ("{:>9}", lambda row: row["registers"]),
    "stack": ("{:>5}", lambda row: row["stack"] + row["local"]),
    "shared": ("{:>6}", lambda row: row["shared"]),
    "CTAs/SM": ("{:>7}", lambda row: row["ctas"]),
    "128-bit": ("{:>7}", lambda row: f"{row['wide']}/{row['loaded']}"),
    "dot": ("{:13}", lambda row: f"{row['dot']} {row['tensor core']}"),
    "configuration (first case)": (
        "{}",
        lambda row: f"{row['configuration']} ({row['case']}, {row['shape']})",
    ),
}


def wanted(arch: int, case: str, shape: str) -> bool:
    """For the other GPUs, one real size of every kernel, and all of the matrix products."""
    return arch == 90 or shape.startswith("A ") or case.startswith("encode")


def recorded() -> list[Launch]:
    """Every launch of every case for every target, each once."""
    found: list[Launch] = []
    for arch in TARGETS:
        for case, shape, call in cases():
            if not wanted(arch, case, shape):
                continue
            with recording(arch, case, shape) as launches:
                try:
                    call()
                except Exception as problem:  # raised again, with the case it is of
                    problem.add_note(f"in {case}, {shape}, for sm_{arch}")
                    raise
            for launch in launches:
                if launch not in found:
                    found.append(launch)
    return found


def identity(launch: Launch) -> dict[str, Any]:
    return {
        "kernel": launch.kernel,
        "configuration": launch.configuration,
        "arch": launch.arch,
        "case": launch.case,
        "shape": launch.shape,
        "real": launch.shape in REAL,
    }


def resources(launch: Launch) -> dict[str, Any]:
    """Compile a launch and read what it needs: bytes of stack and local memory are a thread's."""
    compiled = launch.compile()
    ptx, metadata = compiled.asm["ptx"], compiled.metadata
    usage = registers(compiled.asm["cubin"])
    loads = loaded_bytes(ptx)
    dot = re.search(r"tt\.dot\b.*: tensor<[\dx]+x(\w+)>", compiled.asm["ttir"])
    cores = [name for name, pattern in TENSOR_CORES.items() if re.search(pattern, ptx)]
    return {
        "warps": metadata.num_warps,
        "stages": metadata.num_stages,
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "local": usage["LOCAL"],
        "shared": metadata.shared,
        "ctas": resident_ctas(launch.arch, usage["REG"], metadata.num_warps, metadata.shared),
        "wide": sum(n for n in loads if n >= 16),
        "loaded": sum(loads),
        "dot": dot[1] if dot else "",
        "tensor core": cores[0] if cores else "",
    }


def registers(cubin: bytes) -> dict[str, int]:
    """What ptxas gave a kernel, by the names that cuobjdump uses."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}


def resident_ctas(arch: int, registers: int, warps: int, shared: int) -> int:
    """How many CTAs of a kernel one SM holds at a time: its occupancy."""
    allocated = -(-registers // 8) * 8  # registers of a thread come in eights
    return min(
        REGISTERS // (max(allocated, 8) * 32 * warps),
        THREADS // (32 * warps),
        SHARED[arch] // (shared + RESERVED),
        MOST_CTAS,
    )


def loaded_bytes(ptx: str) -> list[int]:
    """Bytes per thread of each load from global memory; a bulk copy counts as one of 16."""
    loads = re.findall(r"\bld\.global\S*?(?:\.v(\d))?\.[busf](\d+)\b", ptx)
    copies = re.findall(r"\bcp\.async\.c[ag]\.\S+ \[.*?\], \[.*?\], (\w+)", ptx)
    bulk = re.findall(r"\bcp\.async\.bulk\.\S*shared\S*global", ptx)
    sizes = [int(vector or 1) * int(bits) // 8 for vector, bits in loads]
    return sizes + [int(size, 0) for size in copies] + [16] * len(bulk)


def measured(launches: Iterable[Launch]) -> list[dict[str, Any]]:
    """A row of the table for each launch, with the error where it does not compile."""
    # Forked, so that nobody has to import torch again; no thread has been started.
    with ProcessPoolExecutor(mp_context=get_context("fork")) as pool:
        started = [(identity(launch), pool.submit(resources, launch)) for launch in launches]
        return [row | outcome(future) for row, future in started]


def outcome(future: Future) -> dict[str, Any]:
    try:
        return future.result()
    except BrokenProcessPool:
        return {"error": "the compiler crashed, here or on a launch that it worked on meanwhile"}
    except Exception as problem:  # of the compiler: a row of the table, and a test that fails
        return {"error": f"{type(problem).__name__}: {str(problem)[-500:]}"}


def line(row: dict[str, Any]) -> str:
    if "error" in row:
        return "{kernel} sm_{arch} {configuration} ({case}, {shape}): {error}".format_map(row)
    return " ".join(form.format(value(row)) for form, value in COLUMNS.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compile every kernel, print what it needs")
    parser.add_argument("--json", type=Path, help="where to write the table for programs")
    arguments = parser.parse_args()
    table = measured(recorded())
    table.sort(key=lambda row: (row["kernel"], row["configuration"], row["arch"]))
    print(f"triton {triton.__version__}")
    print(" ".join(form.format(name) for name, (form, _) in COLUMNS.items()))
    print("\n".join(line(row) for row in table))
    if arguments.json:
        arguments.json.write_text(json.dumps(table))
