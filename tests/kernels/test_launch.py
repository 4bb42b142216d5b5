import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastsae_kernels import _launch
from fastsae_kernels._launch import (
    INTERPRET,
    buffer_bytes,
    check_codes,
    check_indices,
    check_shape,
    interpreted,
    power_of_2,
    rows_at_a_time,
    use_triton,
)
from fastsae_kernels.testing import assert_no_worse

needs_interpreter = pytest.mark.skipif(not INTERPRET, reason="TRITON_INTERPRET is not set")
CPU = torch.device("cpu")


@needs_interpreter
def test_kernels_run_on_the_cpu_only_where_asked_for():
    x = torch.ones(1)
    assert not use_triton(x)
    with interpreted():
        with interpreted():
            assert use_triton(x)
        assert use_triton(x)
    with pytest.raises(KeyError), interpreted():
        raise KeyError
    assert not use_triton(x)


@needs_interpreter
def test_other_threads_are_not_affected():
    seen = []
    with interpreted():
        thread = threading.Thread(target=lambda: seen.append(use_triton(torch.ones(1))))
        thread.start()
        thread.join()
    assert seen == [False]


def test_the_interpreter_must_have_been_chosen(monkeypatch):
    monkeypatch.setattr(_launch, "INTERPRET", False)
    with pytest.raises(ValueError, match="set TRITON_INTERPRET=1 before"), interpreted():
        pass


def test_a_gpu_without_triton_is_one_clear_error(monkeypatch):
    monkeypatch.setattr(_launch, "HAS_TRITON", False)
    with FakeTensorMode():
        x = torch.empty(1, device="cuda")
    with pytest.raises(ValueError, match="CUDA tensors need Triton, .*: pip install"):
        use_triton(x)
    assert not use_triton(torch.ones(1))


@pytest.mark.parametrize(("n", "least"), [(1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_power_of_2(n, least):
    assert power_of_2(n) == least


def test_codes_and_shapes_that_fit_are_accepted():
    check_codes(torch.ones(2, 3), torch.full((2, 3), 4))
    check_codes(None, torch.empty(0, 3, dtype=torch.int32))
    check_indices(torch.full((2, 3), 4), 5)
    check_shape("x", torch.ones(2, 3), 2, 3)
    check_shape("x", torch.ones(2, 3), None, 3)


def test_errors_say_what_was_given_and_what_is_allowed():
    with pytest.raises(ValueError, match=r"x must .* \[2, any\], got torch.float32 .* \[3, 3\]"):
        check_shape("x", torch.ones(3, 3), 2, None)
    with pytest.raises(ValueError, match=r"lie in \[0, 5\), got 0 to 7"):
        check_indices(torch.tensor([[0, 7]]), 5)


def test_size_of_the_buffer(monkeypatch):
    monkeypatch.setattr("fastsae_kernels._launch._BUFFER_MB", None)
    gpu = torch.device("cuda")
    for card, budget in ((8 << 30, 512 << 20), (160 << 30, 5 << 30)):
        monkeypatch.setattr("fastsae_kernels._launch._gpu_bytes", lambda device, card=card: card)
        assert buffer_bytes(gpu) == budget
    assert buffer_bytes(CPU) == 256 << 20
    assert buffer_bytes(torch.device("meta")) == 512 << 20
    monkeypatch.setattr("fastsae_kernels._launch._BUFFER_MB", "3")
    assert buffer_bytes(CPU) == buffer_bytes(gpu) == 3 << 20


@pytest.mark.parametrize(
    ("N", "most", "rows"),
    [
        (4096, 2236, 2048),  # two chunks: 1 M latents in bfloat16, 1/32 of an H200
        (8192, 16000, 8192),  # all at once
        (1000, 1000, 1000),
        (0, 1000, 1),
        (5000, 2236, 1792),  # 1,667 would be equal: whole tiles of 256
        (600, 500, 384),  # 300 would be equal, and 512 too many: whole tiles of 128
        (1000, 260, 256),
        (250, 127, 125),  # no whole tile fits
        (3, 0, 1),
    ],
)
def test_rows_at_a_time_on_a_gpu(monkeypatch, N, most, rows):
    monkeypatch.setattr("fastsae_kernels._launch.buffer_bytes", lambda device: 40 * most)
    assert rows_at_a_time(torch.empty(N, 3, device="meta"), 10) == rows


def test_rows_at_a_time_on_a_cpu(monkeypatch):
    monkeypatch.setattr("fastsae_kernels._launch._BUFFER_MB", None)
    assert rows_at_a_time(torch.empty(4096, 3), 24576) == 256
    assert rows_at_a_time(torch.empty(4096, 3), 64) == 4096
    assert rows_at_a_time(torch.empty(300, 3), 24576) == 150
    assert rows_at_a_time(torch.empty(4, 3), 1 << 28) == 1


def test_assert_no_worse_sees_what_is_wrong():
    x = torch.randn(5, 4)

    def double(x):
        return x + x, torch.arange(4)

    assert_no_worse(lambda x: (2 * x, torch.arange(4)), double, x)
    assert_no_worse(lambda x: x.detach().sign(), lambda x: x.sign(), x[:0])
    wrong = {
        "gradient": lambda x: double(x.detach()),
        "output 0": lambda x: (2.001 * x, torch.arange(4)),
        "output 1": lambda x: (2 * x, torch.arange(1, 5)),
        "gradient 0": lambda x: (x + x.detach(), torch.arange(4)),
        "error nan": lambda x: (2 * x + torch.where(x == x[0, 0], torch.nan, 0), torch.arange(4)),
    }
    for name, op in wrong.items():
        with pytest.raises(AssertionError, match=name):
            assert_no_worse(op, double, x)
