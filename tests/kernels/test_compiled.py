"""Every public op under torch.compile: one graph, and one for all numbers of tokens."""

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo import config, mark_dynamic
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config

from .every_op import OPS, RAGGED, ROTATIONS, arguments_on, gradients

SIZES = range(20, 32)
"""Numbers of tokens that are no other size of the arguments."""

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture(scope="module")
def inductor() -> Iterator[str]:
    """Skips where it cannot compile anything: it needs a C++ compiler and Python's headers.

    Scalar code compiles faster, and nobody has to try which vectors there are.
    """
    with inductor_config.patch({"cpp.simdlen": 1}):
        try:
            torch.compile(lambda x: x + 1, backend="inductor")(torch.ones(3))
        except Exception as error:
            pytest.skip(f"inductor compiles nothing here: {type(error).__name__}")
        yield "inductor"


def compiled(name: str, backend: str):
    return torch.compile(OPS[name][0], fullgraph=True, backend=backend)


def ragged(name: str):
    return config.patch(capture_dynamic_output_shape_ops=name in RAGGED)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPS)
def test_a_graph_is_compiled_once_more_when_the_number_changes(name, device):
    """And computes the bits that eager mode does. Interpreted kernels would be the same graph."""
    (op, make), traced = OPS[name], compiled(name, "aot_eager")
    for N in (5, 6, 7):
        arguments = arguments_on(device, make(N))
        with ragged(name):
            found = gradients(traced, arguments)
        for a, b in zip(gradients(op, arguments), found, strict=True):
            assert torch.equal(a, b)
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("name", [name for name in OPS if name not in ROTATIONS])
@pytest.mark.filterwarnings("ignore")  # torch's own
def test_inductor_compiles_once_for_all_numbers(name, inductor):
    (op, make), traced = OPS[name], compiled(name, inductor)
    for N in SIZES:
        arguments = arguments_on("cpu", make(N), torch.float64)  # inductor sums in another order
        for tensor in arguments:
            if tensor.shape[:1] == (N,):
                mark_dynamic(tensor, 0)
        with ragged(name):
            found = gradients(traced, arguments)
        for a, b in zip(gradients(op, arguments), found, strict=True):
            torch.testing.assert_close(a, b)
    assert counters["stats"]["unique_graphs"] == 1
