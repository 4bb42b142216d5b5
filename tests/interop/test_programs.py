"""The libraries' own programs on a tiny model, with their library accelerated and as it is."""

import pytest
import torch
from torch.testing import assert_close

import fastsae
from bench.peers.programs import PROGRAMS, Work, compare
from fastsae.dropin.dense import MIN_TOKENS

from .peers import D_IN, D_SAE, K

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries

WORK = Work(2 * MIN_TOKENS, D_IN, D_SAE, K, steps=6, lr=0.01, vocabulary=50)


@pytest.mark.parametrize("library", PROGRAMS)
def test_a_program_trains_to_the_same_weights(library, tmp_path):
    pytest.importorskip(library)
    found = []
    for accelerate in (False, True):
        with torch.profiler.profile() as seen:
            folder = tmp_path / str(accelerate)
            found.append(fastsae.load(PROGRAMS[library](folder, WORK, accelerate).folder))
        ours = [event.key for event in seen.key_averages() if event.key.startswith("fastsae::")]
        assert bool(ours) == accelerate
    theirs, ours = (sae.state_dict() for sae in found)
    assert all(torch.isfinite(p).all() for p in theirs.values())
    assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_programs_are_timed():
    pytest.importorskip("dictionary_learning")
    row = compare(PROGRAMS["dictionary_learning"], WORK, rounds=1)
    assert row["library"]["FVU"] == pytest.approx(row["accelerated"]["FVU"], rel=1e-3)
    assert row["ratio"] > 0 and row["of rounds"][0] <= row["ratio"] <= row["of rounds"][1]
