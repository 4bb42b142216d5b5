"""Rows that a producer makes in order come out mixed, each once, and again after a cursor."""

import re
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsae.data import Cursor, Group, Place, Stream
from fastsae.data.mixing import BLOCKS_HELD, DOCUMENT, Mixer, effective_number
from fastsae.data.prefetch import Batches
from fastsae.data.source import Contexts


class Numbers:
    """Rows that are their own numbers, at two hookpoints, in groups of uneven sizes."""

    fingerprint = "numbers"

    def __init__(self, rows: int, document_rows: int = 10):
        self.widths = {"one": 1, "two": 2}
        self.rows, self.document_rows = rows, document_rows

    def groups(self, start: Place = (), part: str = "train") -> Iterator[Group]:
        first = start[0] if start else 0
        while part == "train" and first < self.rows:
            number = torch.arange(first, min(first + 17 + first % 13, self.rows))
            first = int(number[-1]) + 1
            x, document = number[:, None].half(), number // self.document_rows
            contexts = Contexts(number, number % self.document_rows, document)
            yield Group((x, torch.cat([x, -x], 1)), contexts, (first,))


def mixer(stream: Stream, batch_size: int, seed: int = 0) -> Mixer:
    return Mixer(stream._production.block, stream.columns, seed, stream.tally, batch_size)


@given(st.integers(2, 400), st.integers(2, 60), st.integers(1, 300))
@settings(max_examples=40, deadline=None)
def test_every_row_is_drawn_once(buffer: int, batch_size: int, rows: int):
    """What is produced is what was drawn and what is still in the buffer, over several passes. The
    buffer holds no more rows than it is to: of a block that is smaller than a group, the group's,
    and where shares of a group's rows are no whole numbers, up to one more for each of them."""
    stream, drawn = Stream(Numbers(rows), buffer), Counter()
    mixed, cursor = mixer(stream, batch_size), Cursor()
    groups = 3 * 4 * (1 + buffer // 17)
    most = max(buffer, int(29 * BLOCKS_HELD)) + groups + stream._production.piece_tokens
    for _ in range(1 + 3 * rows // batch_size):
        batch = mixed.batch(cursor, lambda: False)
        cursor = batch.cursor
        drawn.update(batch.x[:, 0].tolist())
        assert mixed.stored.capacity <= most
        assert torch.equal(batch.x[:, [0, 0]] * torch.tensor([1, -1]), batch.x[:, 1:])
    left = [mixed.order[cursor.position :]]
    left += [places for several in mixed.waiting.values() for places in several]
    drawn.update(mixed.stored.pick(torch.cat(left)).rows[0][:, 0].tolist())
    passes, more = divmod(stream.tally.produced, rows)
    assert sum(drawn.values()) == stream.tally.produced
    for number in range(rows):
        assert drawn[float(number)] == passes + (number < more)


@given(st.integers(2, 300), st.integers(1, 50), st.integers(0, 40), st.integers(1, 200))
@settings(max_examples=40, deadline=None)
def test_a_stream_continues_after_any_batch(buffer: int, batch_size: int, stop: int, rows: int):
    with Stream(Numbers(rows), buffer).batches(batch_size, seed=3) as batches:
        whole = [next(batches) for _ in range(stop + 5)]
    cursor = whole[stop].cursor
    with Stream(Numbers(rows), buffer).batches(batch_size, seed=3, cursor=cursor) as batches:
        for expected in whole[stop + 1 :]:
            found = next(batches)
            assert torch.equal(found.x, expected.x) and found.cursor == expected.cursor
            np.testing.assert_array_equal(found.rows, expected.rows)


def test_another_seed_gives_another_order():
    def first(seed: int) -> torch.Tensor:
        with Stream(Numbers(1000), 400).batches(50, seed=seed) as batches:
            return next(batches).x

    assert not torch.equal(first(0), first(1))


def test_a_batch_has_the_documents_of_four_blocks():
    """Half of its rows are from the newest block, then a quarter, an eighth and an eighth."""
    buffer, batch_size, document_rows = 20_000, 200, 100
    with Stream(Numbers(60_000, document_rows), buffer).batches(batch_size) as batches:
        drawn = [next(batches) for _ in range(500)]
    found = [effective_number(batch.rows // DOCUMENT) for batch in drawn[300:]]
    documents = round(buffer * 8 / 15 / document_rows)  # of a block
    share = np.repeat(np.array([4, 2, 1, 1]) / 8 / documents, documents)
    draws = np.random.default_rng(0).choice(len(share), (500, batch_size), p=share / share.sum())
    expected = [effective_number(row) for row in draws]
    assert abs(np.mean(found) - np.mean(expected)) < np.std(expected)


def test_the_effective_number_counts_equal_shares():
    assert effective_number(np.arange(12) % 4) == pytest.approx(4)
    assert effective_number(np.zeros(5, np.int64)) == pytest.approx(1)


@pytest.mark.parametrize("cursor", [(-1, 0), (0, -1), (0, 10_000)])
def test_a_cursor_must_fit(cursor: tuple[int, int]):
    stream = Stream(Numbers(100), 50)
    with (
        pytest.raises(ValueError, match="does not fit"),
        stream.batches(10, cursor=Cursor(*cursor)) as batches,
    ):
        next(batches)


def test_rows_of_several_hookpoints_are_drawn_alike():
    """A stream of one of the hookpoints has the same rows in the same order."""
    both, one = Stream(Numbers(500), 100), Stream(Numbers(500), 100).select("two")
    assert one.d_in == 2 and one.hookpoint == "two" and one.fingerprint != both.fingerprint
    with both.batches(30) as wide, one.batches(30) as narrow:
        for _ in range(10):
            x = next(wide).x
            assert torch.equal(both.part(x, ["two"]), next(narrow).x)
    assert torch.equal(both.sample(20)[:, 1:], one.sample(20))


def test_a_stream_without_rows_is_refused():
    with pytest.raises(ValueError, match="no tokens"):
        Stream(Numbers(0), 100).sample(5)
    with pytest.raises(ValueError, match="at least 2, got 1"):
        Stream(Numbers(10), 1)


def test_wrong_rows_are_named():
    class Wrong(Numbers):
        def __init__(self, spoil: Callable[[torch.Tensor], torch.Tensor]):
            super().__init__(100)
            self.spoil = spoil

        def groups(self, start: Place = (), part: str = "train") -> Iterator[Group]:
            for group in super().groups(start, part):
                one, two = group.rows
                yield group._replace(rows=(one, self.spoil(two)))

    wide = Wrong(lambda x: torch.cat([x, x], 1))
    infinite = Wrong(lambda x: torch.where(x == 13, torch.inf, x))
    with pytest.raises(ValueError, match=r"two: rows must be of shape \(17, 2\), got \(17, 4\)"):
        Stream(wide, 50).sample(5)
    with pytest.raises(ValueError, match="two holds NaN or Inf: document 1, position 3"):
        Stream(infinite, 50).sample(5)


def test_rows_without_contexts_are_named_by_their_place():
    """Their groups count as documents, also after a run is resumed."""

    class Unknown(Numbers):
        def groups(self, start: Place = (), part: str = "train") -> Iterator[Group]:
            return (group._replace(contexts=None) for group in super().groups(start, part))

    class Infinite(Unknown):
        def groups(self, start: Place = (), part: str = "train") -> Iterator[Group]:
            for group in super().groups(start, part):
                yield group._replace(rows=tuple(x / (x != 20) for x in group.rows))

    with pytest.raises(ValueError, match="one holds NaN or Inf: row 3 of the group from place 17"):
        Stream(Infinite(100), 100).sample(50)
    stream, known = Stream(Unknown(1000), 300), Stream(Numbers(1000, 1), 300)
    with stream.batches(100) as some, known.batches(100) as others:
        for _ in range(5):
            found, wanted = next(some), next(others)
            places = [re.findall(r"\d+", stream.where(row)) for row in found.rows.tolist()]
            rows = [int(place) + int(number) for number, place in places]
            assert rows == (wanted.rows // DOCUMENT).tolist()


def test_closing_ends_a_production():
    """A block that would take forever is given up between groups."""

    class Endless(Numbers):
        made = 0

        def groups(self, start: Place = (), part: str = "train") -> Iterator[Group]:
            while True:
                self.made += 1
                yield from Numbers(10).groups()

    endless = Endless(10)
    batches = Stream(endless, 1 << 24).batches(10)
    assert isinstance(batches, Batches)
    assert batches.take(lambda: endless.made > 3) is None
    batches.close()
