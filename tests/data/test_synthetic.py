"""The planted dictionary: repeatable, as sparse as it says, recognized when found."""

from itertools import islice
from typing import Any

import pytest
import torch

from fastsae.data import ActivationSource, Cursor, Synthetic

SMALL: dict[str, Any] = {"d_in": 32, "n_latents": 24, "active": 3, "n_tokens": 2500}


def codes(data: Synthetic, x: torch.Tensor) -> torch.Tensor:
    """The latents of noiseless rows: 24 directions in 32 dimensions are independent."""
    return x.double() @ torch.linalg.pinv(data.dictionary.double())


def test_rows_are_sparse_in_the_dictionary():
    data = Synthetic(**SMALL)
    z = codes(data, data.rows(torch.arange(2500)))
    # float32 rows: their rounding is all that leaks into latents which do not fire
    assert torch.equal((z > 0.4).sum(1), torch.full((2500,), 3))
    assert z[z <= 0.4].abs().max() < 1e-4
    assert torch.allclose(data.dictionary.norm(dim=1), torch.ones(24))


def test_noise():
    quiet, noisy = Synthetic(**SMALL), Synthetic(**SMALL, noise=0.1)
    rows = torch.arange(2500)
    noise = (noisy.rows(rows) - quiet.rows(rows)).double()
    assert noise.std().item() == pytest.approx(0.1, rel=0.02)  # 80 000 entries: 3 sigma is 0.8 %


def test_some_latents_fire_more_where_asked():
    even, heavy = Synthetic(**SMALL), Synthetic(**SMALL, frequency_exponent=1.0)
    counts = [(codes(data, data.rows(torch.arange(2500))) > 0.4).sum(0) for data in (even, heavy)]
    assert counts[0].max() < 1.5 * counts[0].min()
    assert counts[1][0] > 5 * counts[1][-1]


def test_signed_latents_are_negative_in_half_of_their_rows():
    rows, positive = torch.arange(2500), Synthetic(**SMALL)
    data = Synthetic(**SMALL, signed=0.25)
    z, magnitudes = (codes(d, d.rows(rows)) for d in (data, positive))
    active = magnitudes > 0.4
    assert torch.allclose(z.abs(), magnitudes.abs(), atol=1e-4), "only signs differ"
    negative = ((z < -0.4) & active).sum(0) / active.sum(0)
    assert data.signed_latents.sum() == 6 and (negative[~data.signed_latents] == 0).all()
    # Each latent is active in about 312 rows: 4 standard deviations of half of them are 0.11.
    assert (negative[data.signed_latents] - 0.5).abs().max() < 0.12
    turned = torch.where(data.signed_latents[:, None], -data.dictionary, data.dictionary)
    assert data.recovery(turned) == pytest.approx(1, abs=1e-6) != positive.recovery(turned)


def test_recovery_is_one_for_the_dictionary_itself():
    data = Synthetic(**SMALL)
    shuffled = 3 * data.dictionary[torch.randperm(24)]
    assert data.recovery(shuffled) == pytest.approx(1, abs=1e-6)
    assert data.recovery(torch.cat([shuffled, torch.randn(100, 32)])) == pytest.approx(1, abs=1e-6)
    assert data.recovery(shuffled[:12]) < 0.9
    assert data.recovery(torch.randn(24, 32)) < 0.6


def test_rows_depend_on_the_settings_alone():
    data = Synthetic(**SMALL)
    rows = torch.randperm(2500)
    assert torch.equal(data.rows(rows), Synthetic(**SMALL).rows(torch.arange(2500))[rows])
    assert torch.equal(data.sample(1500, seed=4), Synthetic(**SMALL).sample(1500, seed=4))
    assert data.sample(10_000).unique(dim=0).shape == (2500, 32)
    other = Synthetic(**SMALL, seed=1)
    assert not torch.equal(data.dictionary, other.dictionary)
    assert data.fingerprint == Synthetic(**SMALL).fingerprint != other.fingerprint


def test_heldout_rows_are_others_of_the_same_dictionary():
    data = Synthetic(**SMALL)
    heldout = data.heldout
    assert heldout is not None and heldout.heldout is None
    assert torch.equal(heldout.dictionary, data.dictionary)
    both = torch.cat([data.sample(2500), heldout.sample(2500)])
    assert both.unique(dim=0).shape == (5000, 32)


@pytest.mark.parametrize("done", [1, 4, 9])
def test_resume_equals_an_uninterrupted_run(done: int):
    source: ActivationSource = Synthetic(**SMALL)
    with source.batches(600, seed=1) as batches:
        whole = list(islice(batches, 12))
    with source.batches(600, seed=1, cursor=whole[done - 1].cursor) as batches:
        for expected, found in zip(whole[done:], batches, strict=False):
            assert torch.equal(expected.x, found.x) and expected.cursor == found.cursor
    epoch = torch.cat([batch.x for batch in whole])[:2500]
    assert epoch.unique(dim=0).shape == (2500, 32)
    assert whole[4].cursor == Cursor(1, 500)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("d_in", 0, "d_in must be at least 1, got 0"),
        ("active", 25, "active must be at most n_latents = 24, got 25"),
        ("signed", 1.5, "signed must be between 0 and 1, got 1.5"),
        ("noise", -1.0, "noise must be at least 0, got -1.0"),
        ("noise", float("nan"), "noise must be at least 0, got nan"),
    ],
)
def test_nonsense_is_refused(setting: str, value: float, message: str):
    with pytest.raises(ValueError, match=message):
        Synthetic(**{**SMALL, setting: value})
    with pytest.raises(ValueError, match="rows must be from 0 to 2499"):
        Synthetic(**SMALL).rows(torch.tensor([2500]))
