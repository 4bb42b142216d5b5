"""Compiles every kernel ahead of time for sm_90 and prints what each needs, as JSON.

Run as a script, in a process without TRITON_INTERPRET, where triton.jit compiles nothing.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastsae_kernels import _topk_kernel, sparse

DTYPES = {"fp32": 0, "bf16": 16}
"""Of the inputs, and the bits that the top-k's keys leave out."""


def cases() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """Kernel, types of its arguments, its constants, warps: what the launchers choose."""
    for dtype, shift in DTYPES.items():
        p, D = f"*{dtype}", {"D": "i32"}
        block = {"BLOCK_D": 1024, "ACC": tl.float32}
        matrix = {"i_ptr": "*i64", "W_ptr": p, "out_ptr": p, **D}
        yield sparse._decode_kernel, {"v_ptr": p, **matrix}, {"K": 64, **block}, 4
        yield sparse._gather_dot_kernel, {"x_ptr": p, **matrix}, {"K": 64, **block}, 4
        runs = {"w_ptr": p, "token_ptr": "*i32", "start_ptr": "*i32", "first": "i32"}
        yield sparse._sum_runs_kernel, {**runs, "x_ptr": p, "out_ptr": p, **D}, block, 4
        rows = {"pre_ptr": p, "group_ptr": "*i32", "packed_ptr": "*i64", "out_ptr": "*i64"}
        for F, k, largest_abs in ((131072, 64, False), (24576, 32, True), (32768, 1024, False)):
            M, V, capacity = _topk_kernel.blocks(F, k, 4 if dtype == "fp32" else 2)
            constants = {"M": M, "V": V, "CAPACITY": capacity, "ABS": largest_abs, "SHIFT": shift}
            types = {**rows, "F": "i32", "k": "i32"}
            yield _topk_kernel._topk_kernel, types, constants, _topk_kernel.warps(M, V)


def resources(kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int) -> dict:
    """Registers, stack and shared memory of one program, in bytes."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = [n for n, name in enumerate(signature) if name.endswith("_ptr") or name in "FD"]
    source = ASTSource(
        kernel,
        signature,
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
        {(n,): [["tt.divisibility", 16]] for n in aligned},
    )
    target = GPUTarget("cuda", 90, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": warps})
    spec = find_spec("triton.backends.nvidia")
    assert spec is not None and spec.submodule_search_locations is not None
    tool = Path(spec.submodule_search_locations[0]) / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(n) for name, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", report)}


if __name__ == "__main__":
    found = [
        {"kernel": kernel.__name__, "types": types, "constants": str(constants)}
        | resources(kernel, types, constants, warps)
        for kernel, types, constants, warps in cases()
    ]
    print(json.dumps(found))
