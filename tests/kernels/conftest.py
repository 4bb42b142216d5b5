"""Every test that asks for a device runs twice: on the torch path and on the Triton kernels."""

import os
from collections.abc import Iterator

import pytest
import torch

from fastsae_kernels._launch import interpreted

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic products on CUDA


@pytest.fixture(scope="session")
def patched_once() -> Iterator[None]:
    """Triton's interpreter in half the time.

    A launch replaces the functions of triton.language by interpreted ones until it ends. Every
    call of a device function then looks for more to replace, and finds some only the first time.
    """
    from triton.runtime import interpreter

    patch, seen = interpreter._patch_lang, set()

    def patch_once(fn):
        if id(fn.__globals__) in seen:  # modules differ in how they import triton.language
            return None
        seen.add(id(fn.__globals__))
        scope = patch(fn)
        restore = scope.restore

        def restore_and_forget():
            restore()
            seen.clear()

        scope.restore = restore_and_forget
        return scope

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
        yield


@pytest.fixture(params=["torch", "triton"])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "torch":
        yield "cpu"
    elif torch.cuda.is_available():
        yield "cuda"
    else:
        request.getfixturevalue("patched_once")
        with interpreted():
            yield "cpu"
