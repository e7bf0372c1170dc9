"""Index tensors are made once a step for tiles that are cut alike, and anew for the next one."""

from __future__ import annotations

import torch

from flexflow_engine.abc.step import RowStep
from flexflow_engine.placement.kv import Rectangle
from flexflow_engine.runtime.token_places import LatestPlaces, TileCut

CPU = torch.device("cpu")


def cut(stop_page: int) -> TileCut:
    parts = [(Rectangle("device", "kv", 0, 2, 0, stop_page), True)]
    return TileCut.of(num_kv_heads=2, page_tokens=4, parts=parts, tail_rows=range(0))


def rows(context: int) -> tuple[RowStep, ...]:
    return tuple(RowStep(row=row, sequence=row, new_tokens=1, context=context) for row in range(2))


def test_one_step_has_its_places_once_for_each_cut() -> None:
    latest, step = LatestPlaces(), rows(5)
    assert latest.of(step, cut(3), CPU) is latest.of(step, cut(3), CPU)
    assert latest.of(step, cut(3), CPU) is not latest.of(step, cut(2), CPU)


def test_the_next_step_has_its_own() -> None:
    latest = LatestPlaces()
    before = latest.of(rows(5), cut(3), CPU)
    after = latest.of(rows(8), cut(3), CPU)
    hidden = [places.hidden(2, 12).flatten(1).tolist() for places in (before, after)]
    assert hidden == [[[column > last for column in range(12)]] * 2 for last in (5, 8)]
    assert (before.pages_seen, after.pages_seen) == ((2,), (3,))
