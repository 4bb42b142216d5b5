"""The encoder GEMM on a CPU: which library, and how many tokens at a time."""

import pytest
import torch

from fastsae_kernels import encode_topk, product
from fastsae_kernels.encode import encode_topk_reference
from fastsae_kernels.product import (
    CPU_PRODUCTS,
    DEFAULT_PRODUCT,
    LIBRARIES,
    CpuProduct,
    cpu_product,
    has_bf16,
    tokens_at_a_time,
)
from fastsae_kernels.testing import assert_no_worse


@pytest.fixture
def choose(monkeypatch):
    """Sets the variable and what instructions there are, and returns the choice."""

    def chosen(words: str = "", instructions: set[str] | None = None) -> CpuProduct:
        monkeypatch.setattr(product, "CPU_PRODUCT", words)
        if instructions is not None:
            monkeypatch.setattr(product, "instructions", lambda: instructions)
        cpu_product.cache_clear()
        return cpu_product()

    yield chosen
    cpu_product.cache_clear()


@pytest.mark.parametrize(
    ("instructions", "expected"),
    [
        ({"AMD", "avx2", "avx512_f"}, CPU_PRODUCTS["AMD", "avx512_f"]),
        ({"Intel", "avx512_f", "avx512_vnni"}, CPU_PRODUCTS["Intel", "avx512_f"]),
        ({"AMD", "avx2"}, DEFAULT_PRODUCT),
        (set(), DEFAULT_PRODUCT),
    ],
)
def test_the_table(choose, instructions, expected):
    assert choose(instructions=instructions) == expected


def test_the_variable(choose):
    assert choose("mkl:7", {"AMD", "avx512_f"}) == CpuProduct("mkl", 7)
    for wrong in ("mkl", "blas:256", "onednn:0", "onednn:x"):
        with pytest.raises(ValueError, match=f"must be mkl or onednn, .* got '{wrong}'"):
            choose(wrong)


def test_without_onednn(choose, monkeypatch):
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: False)
    assert choose("onednn:256") == CpuProduct("mkl", 256)


def test_tokens_at_a_time(choose):
    x = torch.empty(4096, 3)
    choose("mkl:1024")
    assert tokens_at_a_time(x, 24576) == 1024
    choose("onednn:256")
    assert tokens_at_a_time(x, 24576) == 256
    assert tokens_at_a_time(x[:5], 24576) == 5


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("tokens", [1, 4, 100])
def test_every_choice_is_exact(choose, library, tokens):
    choose(f"{library}:{tokens}")
    x, W, b = torch.randn(9, 33), torch.randn(50, 33), torch.randn(50)
    assert_no_worse(
        lambda x, W, b: encode_topk(x, W, b, 5),
        lambda x, W, b: encode_topk_reference(x, W, b, 5),
        x, W, b,
    )  # fmt: skip


def test_bf16_needs_instructions(monkeypatch):
    for name, has in (("avx512_f", False), ("avx512_bf16", True), ("amx_bf16", True)):
        monkeypatch.setattr(product, "instructions", lambda name=name: {name})
        assert has_bf16() == has
