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
from itertools import pairwise

import networkx as nx

from flexflow_engine.abc.policy import MemoryTable
from flexflow_engine.graph.builder import TaskGraph
from flexflow_engine.graph.task import Task


def check_graph(graphs: Sequence[TaskGraph], widths: Mapping[str, int], memory: MemoryTable) -> None:
    """Check adjoining steps together; tasks that the first of them carries over count as done."""
    tasks = {task.key: task for graph in graphs for task in graph.tasks}
    starts, ends = _orders(graphs, tasks, widths)
    assert nx.is_directed_acyclic_graph(starts), "rule 1: the graph with the lanes' order has a cycle"
    before = _ancestors(ends)
    _check_versions(tasks, before)
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


def _ancestors(digraph: nx.DiGraph[str]) -> dict[str, set[str]]:
    ancestors: dict[str, set[str]] = {}
    for key in nx.topological_sort(digraph):
        ancestors[key] = set().union(*({p} | ancestors[p] for p in digraph.predecessors(key)))
    return ancestors


def _check_versions(tasks: Mapping[str, Task], before: Mapping[str, set[str]]) -> None:
    writers: dict[tuple[str, int], dict[int, str]] = defaultdict(dict)
    readers: dict[tuple[str, int], list[str]] = defaultdict(list)
    for task in tasks.values():
        for ref in task.writes:
            parts = writers[ref.location, ref.version]
            assert ref.part not in parts, f"rule 2: {parts.get(ref.part)} and {task.key} both make {ref}"
            parts[ref.part] = task.key
        for ref in task.reads:
            readers[ref.location, ref.version].append(task.key)
    for version, keys in readers.items():
        for reader in keys:
            for writer in writers[version].values():
                assert writer in before[reader], f"rule 3: {reader} reads {version}, which {writer} makes unordered"
    for (location, number), parts in writers.items():
        touched = [*writers.get((location, number - 1), {}).values(), *readers.get((location, number - 1), ())]
        for writer in parts.values():
            for earlier in touched:
                assert earlier in before[writer] or earlier == writer, (
                    f"rule 4: {writer} begins version {number} of {location} while {earlier} may use the last one"
                )
