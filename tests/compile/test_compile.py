"""Every kernel compiles for sm_90, without a GPU, and keeps what it holds in registers."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastsae_kernels

pytest.importorskip("triton.backends.nvidia.compiler")


@pytest.fixture(scope="module")
def found() -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("resources.py")
    command = [sys.executable, str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_nothing_is_spilled(found):
    spilled = [case for case in found if case["STACK"] or case["LOCAL"]]
    assert not spilled


def test_no_kernel_is_left_out(found):
    files = Path(fastsae_kernels.__file__).parent.glob("*.py")
    source = "".join(file.read_text() for file in files)
    assert {case["kernel"] for case in found} == set(re.findall(r"def (_\w+_kernel)\(", source))
