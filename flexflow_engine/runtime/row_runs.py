"""Rows of a GPU batch that follow each other, so that one call takes them all."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import groupby

from flexflow_engine.abc.step import RowStep


def adjoining(
    rows: Sequence[RowStep], kind: Callable[[RowStep], Hashable], most: Callable[[RowStep], int]
) -> list[Sequence[RowStep]]:
    """Runs of rows that follow each other and are of one kind; of a kind no more together than `most` says."""
    runs: list[Sequence[RowStep]] = []
    for _, group in groupby(enumerate(rows), lambda numbered: (numbered[1].row - numbered[0], kind(numbered[1]))):
        run = [row for _, row in group]
        step = most(run[0])
        runs += [run[first : first + step] for first in range(0, len(run), step)]
    return runs


def rows_from(first: int, rows: Sequence[RowStep]) -> slice:
    """Adjoining rows, counted from row `first`."""
    start = rows[0].row - first
    return slice(start, start + len(rows))
