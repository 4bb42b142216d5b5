"""Parametrizations that the tests of several ops share."""

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

import pytest
import torch

BY = "value", "abs"
each_by = pytest.mark.parametrize("by", BY)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def pairwise(indirect: Sequence[str] = (), **factors: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrize a test so that every two choices of two factors meet in some case.

    For factors that act independently of each other: a defect that only a combination of three
    choices shows is not found. Of 4 shapes, 2 dtypes, 2 algorithms and 3 gradients these are 12
    cases instead of 48.
    """
    every = list(product(*(range(len(choices)) for choices in factors.values())))

    def pairs(case: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        return set(combinations(enumerate(case), 2))

    missing, cases = set().union(*map(pairs, every)), []
    while missing:
        cases.append(max(every, key=lambda case: len(missing & pairs(case))))
        missing -= pairs(cases[-1])
    values = [[c[n] for c, n in zip(factors.values(), case, strict=True)] for case in cases]
    return pytest.mark.parametrize(list(factors), values, ids=str, indirect=list(indirect))
