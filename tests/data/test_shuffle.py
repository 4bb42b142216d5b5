"""Every row once per epoch, another order per epoch and seed, and entry at any position."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsae.data.shuffle import Cursor, Shuffle


def rows(order: Shuffle, n: int, cursor: Cursor | None = None) -> np.ndarray:
    pieces, _ = order.take(cursor or Cursor(), n)
    return np.concatenate([piece.rows[piece.picks] for piece in pieces])


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 500), window=st.integers(1, 300), block=st.integers(1, 70))
def test_every_row_once_per_epoch(n: int, window: int, block: int):
    order = Shuffle(n, 3, window, block)
    stream = rows(order, 2 * n)
    for epoch in (stream[:n], stream[n:]):
        assert np.array_equal(np.sort(epoch), np.arange(n))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 400), first=st.integers(0, 900), second=st.integers(1, 300))
def test_any_position_is_reached_without_replaying(n: int, first: int, second: int):
    whole = rows(Shuffle(n, 0, 128, 16), first + second)
    _, cursor = Shuffle(n, 0, 128, 16).take(Cursor(), first)
    assert cursor == Cursor(*divmod(first, n))
    assert np.array_equal(rows(Shuffle(n, 0, 128, 16), second, cursor), whole[first:])


def test_order_differs_by_epoch_and_by_seed():
    stream = rows(Shuffle(1000, 0, 256), 2000)
    other = rows(Shuffle(1000, 1, 256), 1000)
    orders = [stream[:1000], stream[1000:], other, np.arange(1000)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert (a == b).mean() < 0.02  # a random permutation agrees in one place on average


def test_neighbours_are_spread_over_the_whole_epoch():
    place = np.argsort(rows(Shuffle(20_000, 0, 4096, 16), 20_000))
    along = np.corrcoef(place, np.arange(20_000))[0, 1]
    assert abs(along) < 0.1  # blocks of 16: 1250 independent places, so 3 sigma is 0.085


def test_global_random_state_is_neither_read_nor_moved():
    np.random.seed(0)
    expected = np.random.rand(), rows(Shuffle(300, 5, 128), 300).tolist(), np.random.rand()
    np.random.seed(0)
    first, second = np.random.rand(), np.random.rand()
    assert (first, second) == (expected[0], expected[2])
    assert rows(Shuffle(300, 5, 128), 300).tolist() == expected[1]


def test_the_order_is_the_same_everywhere():
    """Written down once: another platform, numpy or thread count must give the same rows."""
    assert rows(Shuffle(10, 0, 8, 2), 10).tolist() == [4, 9, 8, 1, 2, 0, 7, 3, 6, 5]


@pytest.mark.parametrize("cursor", [Cursor(-1, 0), Cursor(0, 10), Cursor(0, -1)])
def test_a_cursor_that_does_not_fit_is_refused(cursor: Cursor):
    with pytest.raises(ValueError, match="position from 0 to 9"):
        Shuffle(10, 0, 64).take(cursor, 1)


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        Shuffle(0, 0, 64)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        Shuffle(10, -1, 64)
