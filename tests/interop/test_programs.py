"""The libraries' own programs on a tiny model, with their library accelerated and as it is."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import fastsae
from bench.peers.programs import (
    Program,
    Work,
    compare,
    run_dictionary_learning,
    run_sae_lens,
    run_sparsify,
)
from fastsae.dropin.dense import MIN_TOKENS

from .peers import D_IN, D_SAE, K, dictionary_learning, sae_lens, sparsify

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries

WORK = Work(2 * MIN_TOKENS, D_IN, D_SAE, K, steps=6, lr=0.01, vocabulary=50)

PROGRAMS: dict[str, tuple[Callable[[], Any], Program]] = {
    "sae_lens TopK": (sae_lens, run_sae_lens),
    "sae_lens BatchTopK": (sae_lens, partial(run_sae_lens, kind="BatchTopK")),
    "dictionary_learning TopK": (
        partial(dictionary_learning, "training"),
        run_dictionary_learning,
    ),
    "dictionary_learning Gated": (
        partial(dictionary_learning, "training"),
        partial(run_dictionary_learning, trainer="gdm.GatedSAETrainer"),
    ),
    "sparsify": (sparsify, partial(run_sparsify, exact=True)),
}
"""What skips where the library is missing, and its program."""


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_trains_to_the_same_weights(name, tmp_path):
    installed, program = PROGRAMS[name]
    installed()
    found = []
    for accelerate in (False, True):
        with torch.profiler.profile() as seen:
            folder = tmp_path / str(accelerate)
            found.append(fastsae.load(program(folder, WORK, accelerate).folder))
        ours = [event.key for event in seen.key_averages() if event.key.startswith("fastsae::")]
        if "Gated" not in name:  # whose latents are mostly active at its start
            assert bool(ours) == accelerate
    theirs, ours = (sae.state_dict() for sae in found)
    assert all(torch.isfinite(p).all() for p in theirs.values())
    assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_programs_are_timed():
    installed, program = PROGRAMS["dictionary_learning TopK"]
    installed()
    row = compare(program, WORK, rounds=1)
    before, after = (row[which]["FVU"] for which in ("library", "accelerated"))
    assert before == pytest.approx(after, abs=1.5e-4)  # both are rounded to four decimals
    low, high = row["ratio range"]
    assert 0 < low <= row["ratio"] <= high
