"""Every encoder raises a ValueError that names the wrong argument and says what is allowed."""

from typing import Any

import pytest
import torch

from fastsae_kernels import encode_above, encode_decode, encode_topk, encode_topk_batch

ENCODER = {"x": torch.ones(3, 4), "W_enc": torch.ones(5, 4), "b_enc": torch.ones(5)}
GOOD: dict[Any, dict[str, Any]] = {
    encode_topk: {**ENCODER, "k": 2},
    encode_above: {**ENCODER, "threshold": torch.ones(5)},
    encode_topk_batch: {**ENCODER, "k_total": 2},
    encode_decode: {**ENCODER, "k": 2, "W_dec": torch.ones(5, 6), "b_dec": torch.ones(6)},
}

SHARED = [
    ({"x": torch.ones(4)}, "x must be floating point of shape"),
    ({"W_enc": torch.ones(5, 3)}, r"W_enc must be floating point of shape \[any, 4\]"),
    ({"b_enc": torch.ones(4)}, r"b_enc must be floating point of shape \[5\]"),
    ({"b_enc": torch.ones(5).double()}, "x, W_enc and b_enc must have one dtype"),
    ({"by": "size"}, 'by must be "value" or "abs", got \'size\''),
    ({"by": "size", "x": torch.ones(0, 4)}, 'by must be "value" or "abs"'),
]

K = [
    ({"k": 0}, "k must be between 1 and d_sae = 5, got 0"),
    ({"k": 6}, "k must be between 1 and d_sae = 5, got 6"),
]

OWN: dict[Any, list[tuple[dict[str, Any], str]]] = {
    encode_topk: [*K, ({"shadow": torch.ones(5, 3)}, "shadow must have the shape of W_enc")],
    encode_above: [
        ({"threshold": torch.ones(4)}, r"threshold must be .* of shape \[5\] or \[\], got .*\[4\]"),
        ({"threshold": torch.ones(5).int()}, "threshold must be .* got torch.int32"),
    ],
    encode_topk_batch: [
        ({"k_total": -1}, r"k_total must be between 0 and 3 \* 5 = 15, got -1"),
        ({"k_total": 16}, r"k_total must be between 0 and 3 \* 5 = 15, got 16"),
        ({"hint": torch.ones(2)}, r"hint must be one number, got shape \[2\]"),
    ],
    encode_decode: [
        *K,
        ({"W_dec": torch.ones(4, 6)}, r"W_dec must be floating point of shape \[5, any\]"),
        ({"b_dec": torch.ones(4)}, r"b_dec must be floating point of shape \[6\]"),
        ({"b_dec": torch.ones(6).double()}, "x, W_dec and b_dec must have one dtype"),
        ({"b_dec": torch.ones(6, device="meta")}, "b_dec must be on the device of x, cpu, got"),
        ({"gradient": "rotation"}, "gradient must be one of .* got 'rotation'"),
    ],
}


@pytest.mark.parametrize(
    ("op", "changes", "message"),
    [(op, *case) for op in GOOD for case in SHARED + OWN[op]],
    ids=lambda part: getattr(part, "__name__", None),
)
def test_the_wrong_argument_is_named(op, changes, message):
    with pytest.raises(ValueError, match=message):
        op(**{**GOOD[op], **changes})


@pytest.mark.parametrize("op", GOOD)
def test_the_arguments_that_are_changed_are_right(op):
    op(**GOOD[op])
