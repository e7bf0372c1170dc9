"""The legal graphs, as rules. `check_graph` raises AssertionError, naming the rule, on a graph that breaks one.

1. Acyclic, the lanes' order included: a lane starts its tasks in the order in which they were emitted.
2. One producer: no two tasks make the same part of the same version of a location.
3. Loads before use: whoever reads a version comes after every task that makes it, and before the next version.
4. Slots are disjoint in time: a version begins only after every task that touched the one before has ended.
5. What the layout puts on each tier is within its budget.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product

import networkx as nx

from flexflow_engine.abc.policy import MemoryTable
from flexflow_engine.graph.builder import TaskGraph
from flexflow_engine.graph.task import Task


def check_graph(graphs: Sequence[TaskGraph], widths: Mapping[str, int], memory: MemoryTable) -> None:
    """Check adjoining steps together; tasks that the first of them carries over count as done."""
    tasks = {task.key: task for graph in graphs for task in graph.tasks}
    starts, ends = _orders(graphs, tasks, widths)
    assert nx.is_directed_acyclic_graph(starts), "rule 1: the graph with the lanes' order has a cycle"
    before = _Before(ends)
    for location, versions in _versions(tasks).items():
        _check_location(location, versions, before)
    assert not memory.exceeded, f"rule 5: {', '.join(memory.exceeded)} would exceed the budget"


def _orders(
    graphs: Sequence[TaskGraph], tasks: Mapping[str, Task], widths: Mapping[str, int]
) -> tuple[nx.DiGraph[str], nx.DiGraph[str]]:
    """Which task starts before which, and which *ends* before another starts: in a wide lane only edges tell that."""
    ends: nx.DiGraph[str] = nx.DiGraph()
    ends.add_nodes_from(tasks)
    for graph in graphs:
        ends.add_edges_from((a, b) for a, b in graph.digraph.edges if a in tasks)
    lanes: dict[str, list[str]] = defaultdict(list)
    for task in tasks.values():
        lanes[task.lane].append(task.key)
    for lane, keys in lanes.items():
        if widths[lane] == 1:
            ends.add_edges_from(pairwise(keys))
    starts = ends.copy()
    for keys in lanes.values():
        starts.add_edges_from(pairwise(keys))
    return starts, ends


class _Before:
    """Which tasks end before which others start: for each task a set of tasks, as the bits of one number. Sets of keys
    were tried: a gigabyte for the 5700 tasks of two steps, where this takes 4 MB.
    """

    def __init__(self, digraph: nx.DiGraph[str]) -> None:
        self._place: dict[str, int] = {}
        self._ancestors: dict[str, int] = {}
        for place, key in enumerate(nx.topological_sort(digraph)):
            self._place[key] = place
            ancestors = 0
            for before in digraph.predecessors(key):
                ancestors |= self._ancestors[before] | 1 << self._place[before]
            self._ancestors[key] = ancestors

    def holds(self, earlier: str, later: str) -> bool:
        """Whether `earlier` ends before `later` starts, whatever the lanes' speed."""
        return bool(self._ancestors[later] >> self._place[earlier] & 1)


@dataclass(slots=True)
class _Version:
    """The tasks that touch one version of a location."""

    writers: dict[int, str] = field(default_factory=dict)
    """Part -> task."""
    readers: list[str] = field(default_factory=list)

    @property
    def first(self) -> list[str]:
        """Those that nobody of the same version comes before."""
        return list(self.writers.values()) or self.readers


def _versions(tasks: Mapping[str, Task]) -> dict[str, dict[int, _Version]]:
    locations: dict[str, dict[int, _Version]] = defaultdict(lambda: defaultdict(_Version))
    for task in tasks.values():
        for ref in task.writes:
            writers = locations[ref.location][ref.version].writers
            assert ref.part not in writers, f"rule 2: {writers.get(ref.part)} and {task.key} both make {ref}"
            writers[ref.part] = task.key
        for ref in task.reads:
            locations[ref.location][ref.version].readers.append(task.key)
    return locations


def _check_location(location: str, versions: Mapping[int, _Version], before: _Before) -> None:
    for number, version in versions.items():
        for reader, writer in product(version.readers, version.writers.values()):
            assert before.holds(writer, reader), (
                f"rule 3: {reader} reads version {number} of {location}, which {writer} makes unordered"
            )
    for (_, last), (number, version) in pairwise(sorted(versions.items())):
        for earlier, first in product((*last.writers.values(), *last.readers), version.first):
            assert earlier == first or before.holds(earlier, first), (
                f"rule 4: {first} begins version {number} of {location} while {earlier} may use the last one"
            )
