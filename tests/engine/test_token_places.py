"""Index tensors are made once a step for tiles that are cut alike, and anew for the next one."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from flexflow_engine.abc.step import RowStep
from flexflow_engine.placement.kv import Rectangle
from flexflow_engine.runtime.token_places import FullTails, LatestPlaces, TileCut, TokenPlaces

CPU = torch.device("cpu")


def cut(stop_page: int) -> TileCut:
    parts = [(Rectangle("device", "kv", 0, 2, 0, stop_page), True)]
    return TileCut.of(num_kv_heads=2, page_tokens=4, parts=parts, tail_rows=range(0))


def rows(context: int) -> tuple[RowStep, ...]:
    return tuple(RowStep(row=row, sequence=row, new_tokens=1, context=context) for row in range(2))


def test_one_step_has_its_places_once_for_each_cut() -> None:
    latest, step = LatestPlaces(), rows(5)
    three, two = latest.shared(cut(3)), latest.shared(cut(2))
    assert latest.shared(cut(3)) is three
    assert latest.of(step, three, CPU) is latest.of(step, three, CPU)
    assert latest.of(step, three, CPU) is not latest.of(step, two, CPU)


def test_the_next_step_has_its_own() -> None:
    latest = LatestPlaces()
    before = latest.of(rows(5), cut(3), CPU)
    after = latest.of(rows(8), cut(3), CPU)
    hidden = [places.hidden(2, 12).flatten(1).tolist() for places in (before, after)]
    assert hidden == [[[column > last for column in range(12)]] * 2 for last in (5, 8)]
    assert (before.pages_seen, after.pages_seen) == ((2,), (3,))


@given(st.lists(st.integers(0, 500), min_size=1, max_size=40))
def test_shares_are_as_even_as_heads_allow(contexts: list[int]) -> None:
    step = tuple(RowStep(row=row, sequence=row, new_tokens=1, context=c) for row, c in enumerate(contexts))
    rectangle = Rectangle("device", "kv", 0, len(contexts), 0, 200)
    tiles = TileCut.of(num_kv_heads=3, page_tokens=4, parts=[(rectangle, True)], tail_rows=range(0))
    places = TokenPlaces(step, tiles, CPU)
    assert places.table.tolist() == [[row, context] for row, context in enumerate(contexts)]
    assert (places.tokens_seen, places.longest_seen) == (sum(contexts) + len(contexts), max(contexts) + 1)
    loads = [context + 1 for context in contexts for _ in range(3)]
    for count in (2, 3, 2):
        bounds = places.shares(count)
        assert (bounds[0], bounds[-1], len(bounds)) == (0, len(loads), count + 1)
        for first, stop in pairwise(bounds):
            assert abs(sum(loads[first:stop]) - sum(loads) / count) <= 2 * max(loads)


def test_full_tails_of_adjoining_rows_in_one_part_are_one_run() -> None:
    """Rows 0 to 3 lie in two parts, and row 2's tail isn't full."""
    parts = [(Rectangle("host", "kv", 0, 2, 0, 3), False), (Rectangle("disk", "kv", 2, 5, 1, 3), False)]
    tiles = TileCut.of(num_kv_heads=2, page_tokens=4, parts=parts, tail_rows=range(5))
    contexts = [7, 7, 6, 7, 7]
    step = tuple(RowStep(row=row, sequence=row, new_tokens=1, context=c) for row, c in enumerate(contexts))
    places = LatestPlaces().of(step, tiles, CPU)
    assert places.num_full_tails == 4
    whole = [FullTails(0, 1, slice(0, 2), slice(0, 2)), FullTails(1, 0, slice(1, 3), slice(3, 5))]
    assert places.full_tails(most=4) == whole
    singles = [(0, 0), (0, 1), (1, 3), (1, 4)]
    assert [(full.part, full.tails.start) for full in places.full_tails(most=1)] == singles
    assert places.full_tails(most=4) == whole
