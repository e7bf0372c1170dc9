"""Builds a step's graph task by task, and derives its edges from what the tasks read and write.

Edges follow the three hazards of any memory: a read waits for the writers of the version it reads, a write of a new
version waits for the readers and writers of the version before. A location is a slot as well as a resident region,
so slot reuse needs no rule of its own.

    changing state    tasks      of the step so far, in the order in which lanes will run them
                      locations  each location's current version with its writers and readers
                      rotation   how often each ring of slots has been advanced
    constant          widths     of the lanes; in a lane of width 1 an earlier task is implied by a later one
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import networkx as nx

from flexflow_engine.graph.task import Operation, Task, TaskKind, TensorRef, Tile


class LocationUse(NamedTuple):
    """Who touched a location's current version: (task, lane) pairs; and who must end before another part is added."""

    version: int = 0
    writers: tuple[tuple[str, str], ...] = ()
    readers: tuple[tuple[str, str], ...] = ()
    before: tuple[tuple[str, str], ...] = ()

    @property
    def last(self) -> tuple[tuple[str, str], ...]:
        """The tasks that must end before the location may change: each group implies the ones after it."""
        return self.readers or self.writers or self.before

    def within(self, tasks: Collection[str]) -> LocationUse:
        """The same, of these tasks only."""
        groups = (self.writers, self.readers, self.before)
        return LocationUse(self.version, *(tuple(entry for entry in group if entry[0] in tasks) for group in groups))


_UNTOUCHED = LocationUse()


@dataclass(frozen=True, slots=True)
class Frontier:
    """What the next step's graph is joined to: the tasks of the step before it. Earlier steps have ended when it is
    submitted (`Executor.submit`); a page that is read and not written would gather readers for the rest of the job.
    """

    locations: Mapping[str, LocationUse] = field(default_factory=dict)
    rotation: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TaskGraph:
    """One step's tasks in emission order, which is a topological order and every lane's order.

    `digraph` has a node for each task (attribute `task`) and for each carried task of the step before (no attribute).
    """

    step: int
    tasks: tuple[Task, ...]
    digraph: nx.DiGraph[str]
    inherited: Mapping[str, int] = field(default_factory=dict)
    """Versions that the steps before have left; 0 where a location is missing. Whatever is newer is made here."""


class GraphBuilder:
    """Used by the compiler for one step."""

    def __init__(self, frontier: Frontier, widths: Mapping[str, int]) -> None:
        self._tasks: list[Task] = []
        self._digraph: nx.DiGraph[str] = nx.DiGraph()
        self._locations = dict(frontier.locations)
        self._inherited = {name: use.version for name, use in frontier.locations.items()}
        self._rotation = dict(frontier.rotation)
        self._widths = widths

    def next_slot(self, ring: str, size: int) -> int:
        """The slot of a ring whose turn it is."""
        turn = self._rotation.get(ring, 0)
        self._rotation[ring] = turn + 1
        return turn % size

    def add(
        self,
        *,
        name: str,
        kind: TaskKind,
        tile: Tile,
        lane: str,
        operation: Operation,
        reads: Iterable[str] = (),
        writes: Iterable[str] = (),
        adds: Iterable[str] = (),
        nbytes: int = 0,
        flops: float = 0.0,
    ) -> None:
        """Append a task. It reads locations, writes new versions of some, and adds parts to others' newest version
        (made by `begin`). What it reads and writes may have been begun without parts: then it fills that.
        """
        key = f"{tile.step}/{tile.layer}/{tile.gpu_batch}/{name}"
        reads, writes = tuple(reads), tuple(writes)
        empty = {location for location in reads if self._is_empty(location)}
        assert empty <= set(writes), f"{key} reads what nothing was loaded into: {empty}"
        predecessors: dict[str, None] = {}
        read_refs = [self._read(location, key, lane, predecessors) for location in reads]
        write_refs = [self._write(location, key, lane, predecessors) for location in writes]
        write_refs += [self._add_part(location, key, lane, predecessors) for location in adds]
        task = Task(
            key=key,
            kind=kind,
            tile=tile,
            lane=lane,
            operation=operation,
            reads=tuple(read_refs),
            writes=tuple(write_refs),
            nbytes=nbytes,
            flops=flops,
            fills=tuple(ref for ref in read_refs if ref.location in empty),
        )
        self._tasks.append(task)
        self._digraph.add_node(key, task=task)
        self._digraph.add_edges_from((before, key) for before in predecessors if before != key)

    def begin(self, location: str) -> None:
        """Start a new version of a location that several tasks will fill, each a part."""
        use = self._use(location)
        self._locations[location] = LocationUse(version=use.version + 1, before=use.last)

    def result(self, step: int) -> tuple[TaskGraph, Frontier]:
        own = {task.key for task in self._tasks}
        locations = {name: use.within(own) for name, use in self._locations.items()}
        return TaskGraph(step, tuple(self._tasks), self._digraph, self._inherited), Frontier(locations, self._rotation)

    def _use(self, location: str) -> LocationUse:
        return self._locations.get(location, _UNTOUCHED)

    def _is_empty(self, location: str) -> bool:
        """Whether a version was begun in this step and nothing has been added to it."""
        use = self._use(location)
        return use.version > self._inherited.get(location, 0) and not use.writers

    def _read(self, location: str, key: str, lane: str, predecessors: dict[str, None]) -> TensorRef:
        use = self._use(location)
        same_lane = [task for task, other in use.readers if other == lane and self._widths[lane] == 1]
        for task in same_lane or [task for task, _ in use.writers or use.before]:
            predecessors[task] = None
        self._locations[location] = LocationUse(
            use.version, use.writers, self._joined(use.readers, key, lane), use.before
        )
        return TensorRef(location, use.version)

    def _write(self, location: str, key: str, lane: str, predecessors: dict[str, None]) -> TensorRef:
        use = self._use(location)
        for task, _ in use.last:
            predecessors[task] = None
        self._locations[location] = LocationUse(use.version + 1, ((key, lane),))
        return TensorRef(location, use.version + 1)

    def _add_part(self, location: str, key: str, lane: str, predecessors: dict[str, None]) -> TensorRef:
        use = self._use(location)
        assert not use.readers, f"{location} is read before it is whole"
        for task, _ in use.before:
            predecessors[task] = None
        self._locations[location] = LocationUse(use.version, (*use.writers, (key, lane)), use.readers, use.before)
        return TensorRef(location, use.version, len(use.writers))

    def _joined(self, tasks: tuple[tuple[str, str], ...], key: str, lane: str) -> tuple[tuple[str, str], ...]:
        """Add a task; in a lane of width 1 it stands for the earlier ones."""
        if self._widths[lane] == 1:
            tasks = tuple(entry for entry in tasks if entry[1] != lane)
        return (*tasks, (key, lane))
