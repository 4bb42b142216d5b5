"""Every shipped configuration of every kernel compiles for three GPUs and keeps to their limits."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import fastsae_kernels

pytest.importorskip("triton.backends.nvidia.compiler")

PARKED = {80: 16, 90: 16, 100: 32}
"""Bytes of stack that are no spill: ptxas parks a few scalars there to run more warps, in other
kernels under each release, while rows that do not fit the registers take a hundred and more."""

LEAST_CTAS = {
    "_adam_kernel": 2,
    "_center_kernel": 8,
    "_rotation_kernel": 4,
    "_squared_error_kernel": 3,
}
"""CTAs per SM that keep enough loads in flight to reach the memory's bandwidth on sm_90, at the
real shapes and in every mode."""

TENSOR_CORES = {80: {"mma"}, 90: {"wgmma"}, 100: {"tcgen05", "mma"}}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    file = tmp_path_factory.mktemp("compile") / "table.json"
    command = [sys.executable, str(Path(__file__).with_name("table.py")), "--json", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


@pytest.fixture
def compiled(rows) -> list[dict]:
    return [row for row in rows if "error" not in row]


def check(rows: list[dict], wrong: Callable[[dict], str]) -> None:
    """Fail with a line for each row of which something is wrong."""
    found = [(row, wrong(row)) for row in rows]
    lines = [
        f"{row['kernel']} on sm_{row['arch']}: {what}; {row['case']}, {row['shape']}: "
        f"{row['configuration']}, {row.get('warps')} warps"
        for row, what in found
        if what
    ]
    if lines:
        pytest.fail("\n".join(lines), pytrace=False)


def test_everything_compiles(rows):
    check(rows, lambda row: row.get("error", ""))


def test_nothing_is_spilled(compiled):
    def spilled(row: dict) -> str:
        stack = row["stack"] + row["local"]
        return f"{stack} bytes of stack at {row['registers']} registers" * (
            stack > PARKED[row["arch"]]
        )

    check(compiled, spilled)


def test_programs_fit_a_multiprocessor(compiled):
    def too_much(row: dict) -> str:
        needs = f"{row['registers']} registers, {row['shared']} bytes of shared memory"
        return "" if row["ctas"] else needs

    check(compiled, too_much)


def test_enough_ctas_share_a_multiprocessor(compiled):
    """For kernels that are bound by memory: fewer would wait for it one after the other."""

    def idle(row: dict) -> str:
        least = LEAST_CTAS[row["kernel"]]
        few = row["ctas"] < least
        return f"{row['ctas']} of {least} CTAs per SM, {row['registers']} registers" * few

    real = [row for row in compiled if row["real"] and row["arch"] == 90]
    check([row for row in real if row["kernel"] in LEAST_CTAS], idle)


def test_aligned_rows_are_loaded_by_128_bits(compiled):
    """A third of all bytes at least: indices and coefficients are not."""

    def narrow(row: dict) -> str:
        # What the encoder found is one entry in 8, and its maxima are few; visits read no rows.
        scattered = row["kernel"] == "_topk_kernel" and row["case"].startswith("encode")
        if scattered or row["kernel"] == "_visits_kernel":
            return ""
        wide, loaded = row["wide"], row["loaded"]
        return f"{wide} of {loaded} bytes by 128 bits" if 3 * wide < loaded else ""

    check([row for row in compiled if row["real"]], narrow)


def test_half_precision_products_use_tensor_cores(compiled):
    def scalar(row: dict) -> str:
        core = row["tensor core"]
        return "" if core in TENSOR_CORES[row["arch"]] else f"{row['dot']} by {core or 'none'}"

    check([row for row in compiled if row["dot"] in ("bf16", "f16")], scalar)


FLOAT8 = "_quantize_kernel", 80  # whose GPUs have no fp8


def test_no_kernel_is_left_out(rows):
    files = Path(fastsae_kernels.__file__).parent.glob("*.py")
    source = "".join(file.read_text() for file in files)
    kernels = re.findall(r"def (_\w+_kernel)\(", source)
    wanted = {(name, arch) for name in kernels for arch in TENSOR_CORES} - {FLOAT8}
    assert wanted == {(row["kernel"], row["arch"]) for row in rows}
