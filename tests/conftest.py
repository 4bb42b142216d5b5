"""Fixtures: where to run, a fixed seed, and memory that reads as NaN until it is written."""

import os
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: kernels can run on the CPU

# Workers that run beside each other share the processors, as do the processes that they start.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
THREADS = max(1, torch.get_num_threads() // WORKERS)
torch.set_num_threads(THREADS)
os.environ["OMP_NUM_THREADS"] = str(THREADS)


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def fast_interpreter() -> Iterator[None]:
    """Make Triton's interpreter several times as fast, without changing what it computes.

    It patches triton.language on every launch and again on every call of a device function: once is
    enough. It builds a table of dtypes for every tensor, and describes the shape of a block again
    for each. It calls the combine function of tl.reduce once per element: here, the two halves of a
    block are combined until one row is left, which is also closer to what a GPU does.

    These are private names of Triton 3.7. Under a release that lacks one of them, the interpreter
    stays as it is: slower, but correct.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    try:
        np_dtype, _ = interpreter._get_np_dtype, interpreter.ReduceOps.generic_reduce
        language = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        restore = language.restore
    except AttributeError:
        yield
        return
    dtypes, blocks, describe = {}, {}, tl.block_type.__init__

    def cached_np_dtype(dtype):
        name = dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = np_dtype(dtype.scalar)
        return dtypes[name]

    def cached_describe(self, element_ty, shape):
        key = element_ty.name, *(getattr(size, "value", size) for size in shape)
        if key not in blocks:
            describe(self, element_ty, shape)
            blocks[key] = vars(self).copy()
        vars(self).update(blocks[key])

    def reduce_by_halves(self, inputs):
        (x,) = inputs
        data = x.handle.data
        while data.shape[self.axis] > 1:
            halves = (self.to_tensor(half, x.dtype) for half in np.split(data, 2, self.axis))
            data = self.combine_fn.fn(*halves).handle.data
        return [self.to_tensor(data if self.keep_dims else data.squeeze(self.axis), x.dtype)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_get_np_dtype", cached_np_dtype)
        patch.setattr(tl.block_type, "__init__", cached_describe)
        patch.setattr(interpreter.ReduceOps, "generic_reduce", reduce_by_halves)
        nothing = SimpleNamespace(restore=lambda: None)
        patch.setattr(interpreter, "_patch_lang", lambda fn: nothing)
        yield
    restore()


@pytest.fixture(scope="module")
def undrawn() -> Iterator[None]:
    """Runs leave no plot of their curves and no report: these take several times as long as a small
    run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastsae.train.results.plot_curves", lambda *arguments: False)
        patch.setattr("fastsae.cli.finished.ReportAtEnd.on_end", lambda *arguments: None)
        yield


@pytest.fixture(autouse=True)
def reproducible():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # also fills every torch.empty with NaN
    yield
    torch.use_deterministic_algorithms(False)
