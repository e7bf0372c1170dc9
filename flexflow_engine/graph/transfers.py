"""Emits the tasks of one transfer: one task where the host addresses either end, else two through a staging slot.

What several threads of a lane can load is several tasks: a GPU batch's cache would keep one of them busy, and the
others would have nothing to do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from flexflow_engine.graph.builder import GraphBuilder
from flexflow_engine.graph.lanes import read_lane, write_lane
from flexflow_engine.graph.task import Copy, Move, Tile
from flexflow_engine.placement.layout import STAGING_SLOTS, Layout
from flexflow_engine.placement.pages import MAX_PAGE_NBYTES
from flexflow_engine.placement.span import Span

TASK_NBYTES = MAX_PAGE_NBYTES
"""That one of several tasks loads at most: as much as of weights."""


class Transfer(NamedTuple):
    """A move between a far tier and the tier where its bytes are used: that of computation, or of attention."""

    source: Span
    target: Span
    unit_nbytes: int
    """Size of the far tier's units."""
    read_nbytes: int | None = None
    """Bytes that the far tier reads for it, where files hold fewer than they deliver."""

    @property
    def nbytes(self) -> int:
        """Bytes of either span."""
        return min(self.source.count, self.target.count) * self.unit_nbytes

    @property
    def moved_nbytes(self) -> int:
        """Bytes that go over the far tier's link."""
        return self.nbytes if self.read_nbytes is None else self.read_nbytes

    @property
    def is_divisible(self) -> bool:
        """Whether both ends have the same units. A page of weights goes to bytes."""
        return self.source.count == self.target.count

    def split(self, max_nbytes: int) -> Iterator[Transfer]:
        """The same in parts of whole units of at most `max_nbytes`, if there is more; it must be divisible then."""
        far_units = min(self.source.count, self.target.count)
        if far_units * self.unit_nbytes <= max_nbytes:
            yield self
            return
        assert self.read_nbytes is None, "a page of weights fits a staging slot"
        step = max(1, max_nbytes // self.unit_nbytes)
        assert self.is_divisible, "only spans of equal units are split"
        for first in range(0, far_units, step):
            count = min(step, far_units - first)
            yield Transfer(_part(self.source, first, count), _part(self.target, first, count), self.unit_nbytes)


class Transfers:
    """Emits into one builder."""

    def __init__(self, layout: Layout, builder: GraphBuilder) -> None:
        self._layout = layout
        self._builder = builder

    def load(self, name: str, tile: Tile, transfers: Sequence[Transfer], *, reads: Sequence[str], adds: str) -> None:
        """From one far tier into `adds`, a location of the near tier that was begun."""
        far = transfers[0].source.tier
        if not self._layout.is_staged(far, transfers[0].target.tier):
            groups = self._of_tasks(transfers)
            for index, group in enumerate(groups):
                self._builder.add(
                    name=f"load {name}" if len(groups) == 1 else f"load {name}.{index}",
                    kind="load",
                    tile=tile,
                    lane=read_lane(far),
                    operation=Copy(far, tuple(Move(t.source, t.target) for t in group)),
                    reads=reads,
                    adds=[adds],
                    nbytes=_nbytes(group),
                )
            return
        for index, (staging, part) in enumerate(self._staged(transfers)):
            slot = self._staging_span(staging, part)
            self._builder.add(
                name=f"read {name}.{index}",
                kind="load",
                tile=tile,
                lane=read_lane(far),
                operation=Copy(far, (Move(part.source, slot),)),
                reads=reads,
                writes=[staging],
                nbytes=part.moved_nbytes,
            )
            self._builder.add(
                name=f"load {name}.{index}",
                kind="load",
                tile=tile,
                lane=read_lane(slot.tier),
                operation=Copy(slot.tier, (Move(slot, part.target),)),
                reads=[staging],
                adds=[adds],
                nbytes=slot.count,
            )

    def store(self, name: str, tile: Tile, transfers: Sequence[Transfer], *, reads: str, writes: str) -> None:
        """From `reads`, on the near tier, to the location `writes` on one far tier."""
        far = transfers[0].target.tier
        self._builder.begin(writes)
        if not self._layout.is_staged(far, transfers[0].source.tier):
            moves = tuple(Move(t.source, t.target) for t in transfers)
            self._builder.add(
                name=f"store {name}",
                kind="store",
                tile=tile,
                lane=write_lane(far),
                operation=Copy(far, moves),
                reads=[reads],
                adds=[writes],
                nbytes=_nbytes(transfers),
            )
            return
        for index, (staging, part) in enumerate(self._staged(transfers)):
            slot = self._staging_span(staging, part)
            self._builder.add(
                name=f"store {name}.{index}",
                kind="store",
                tile=tile,
                lane=write_lane(slot.tier),
                operation=Copy(slot.tier, (Move(part.source, slot),)),
                reads=[reads],
                writes=[staging],
                nbytes=slot.count,
            )
            self._builder.add(
                name=f"write {name}.{index}",
                kind="store",
                tile=tile,
                lane=write_lane(far),
                operation=Copy(far, (Move(slot, part.target),)),
                reads=[staging],
                adds=[writes],
                nbytes=slot.count,
            )

    def _of_tasks(self, transfers: Sequence[Transfer]) -> list[Sequence[Transfer]]:
        """What one task loads each: all of it where one thread loads from the tier, or where it is little."""
        far = self._layout.tier(transfers[0].source.tier)
        if far.read_concurrency == 1 or _nbytes(transfers) <= TASK_NBYTES:
            return [transfers]
        return [[part] for t in transfers for part in (t.split(TASK_NBYTES) if t.is_divisible else [t])]

    def _staged(self, transfers: Sequence[Transfer]) -> Iterator[tuple[str, Transfer]]:
        for transfer in transfers:
            for part in transfer.split(self._layout.staging_nbytes):
                yield f"staging.{self._builder.next_slot('staging', STAGING_SLOTS)}", part

    def _staging_span(self, location: str, part: Transfer) -> Span:
        assert self._layout.staging is not None
        return Span(self._layout.staging, location, 0, part.nbytes)


def _part(span: Span, first: int, count: int) -> Span:
    return Span(span.tier, span.region, span.first + first, count)


def _nbytes(transfers: Sequence[Transfer]) -> int:
    return sum(transfer.moved_nbytes for transfer in transfers)
