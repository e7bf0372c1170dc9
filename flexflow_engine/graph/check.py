"""The legal graphs, as rules. `check_graph` raises AssertionError, naming the rule, on a graph that breaks one.

1. Acyclic, the lanes' order included: a lane starts its tasks in the order in which they were emitted.
2. One producer: no two tasks make the same part of the same version of a location.
3. Loads before use: whoever reads a version comes after every task that makes it, and before the next version. A
   version that the step does not inherit has such tasks, unless its reader fills it, where nothing has to be loaded.
4. Slots are disjoint in time: a version begins only after every task that touched the one before has ended.
5. What the layout puts on each tier is within its budget.
6. Copies stay inside their regions, and those that make one version of a location don't overlap.
7. What a slot holds is used for the tile that it was made for, or the layer; see `graph.check_slots`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import networkx as nx

from flexflow_engine.graph.builder import TaskGraph
from flexflow_engine.graph.check_slots import check_slots
from flexflow_engine.graph.lanes import lane_widths
from flexflow_engine.graph.task import Attend, Compute, Copy, Task
from flexflow_engine.placement.layout import Layout, store_region
from flexflow_engine.placement.memory import allocations, memory_table
from flexflow_engine.placement.span import Span


def check_graph(graphs: Sequence[TaskGraph], layout: Layout) -> None:
    """Check adjoining steps together; tasks that the first of them carries over count as done."""
    tasks = {task.key: task for graph in graphs for task in graph.tasks}
    order, ends = _orders(graphs, tasks, lane_widths(layout))
    locations = _versions(tasks)
    _check_sources(locations, graphs[0].inherited)
    for task in tasks.values():
        _check_fills(task, layout)
    check_slots(tasks.values())
    _check_order(order, ends, locations)
    exceeded = memory_table(layout).exceeded
    assert not exceeded, f"rule 5: {', '.join(exceeded)} would exceed the budget"
    _check_copies(tasks.values(), layout)


def _orders(
    graphs: Sequence[TaskGraph], tasks: Mapping[str, Task], widths: Mapping[str, int]
) -> tuple[list[str], nx.DiGraph[str]]:
    """An order in which tasks may start, and which task *ends* before another starts: in a wide lane only edges tell
    that.
    """
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
    assert nx.is_directed_acyclic_graph(starts), "rule 1: the graph with the lanes' order has a cycle"
    return list(nx.topological_sort(starts)), ends


@dataclass(slots=True)
class _Version:
    """The tasks that touch one version of a location."""

    writers: dict[int, str] = field(default_factory=dict)
    """Part -> task."""
    readers: list[str] = field(default_factory=list)
    fillers: list[str] = field(default_factory=list)
    """Readers that use the version as empty space."""

    @property
    def first(self) -> list[str]:
        """Those that nobody of the same version comes before."""
        return list(self.writers.values()) or self.readers

    @property
    def all(self) -> list[str]:
        return [*self.writers.values(), *self.readers]


_Locations = Mapping[str, Mapping[int, _Version]]


def _versions(tasks: Mapping[str, Task]) -> _Locations:
    locations: dict[str, dict[int, _Version]] = defaultdict(lambda: defaultdict(_Version))
    for task in tasks.values():
        for ref in task.writes:
            writers = locations[ref.location][ref.version].writers
            assert ref.part not in writers, f"rule 2: {writers.get(ref.part)} and {task.key} both make {ref}"
            writers[ref.part] = task.key
        for ref in task.reads:
            locations[ref.location][ref.version].readers.append(task.key)
        for ref in task.fills:
            locations[ref.location][ref.version].fillers.append(task.key)
    return locations


def _check_sources(locations: _Locations, inherited: Mapping[str, int]) -> None:
    """Rule 3: what is read has been made."""
    for location, versions in locations.items():
        for number, version in versions.items():
            if number > inherited.get(location, 0):
                parts, what = len(version.writers), f"version {number} of {location}"
                assert set(version.writers) == set(range(parts)), f"rule 3: a part of {what} is missing"
                for reader in version.readers:
                    filled = reader in version.fillers
                    assert parts or filled, f"rule 3: {reader} reads {what}, which no task makes"
                    assert not (parts and filled), f"rule 3: {reader} fills {what}, which others make"


def _check_fills(task: Task, layout: Layout) -> None:
    """Rule 3: whoever fills a slot has nothing to load into it."""
    if task.fills:
        operation = task.operation
        assert isinstance(operation, Compute | Attend), f"rule 3: {task.key} fills a slot and computes nothing"
        slots = {f"kv.slot.{operation.kv_slot}"} - set(_needed_kv(operation, layout))
        if isinstance(operation, Compute) and all(run.tier in layout.direct for run in layout.weights.table):
            slots.add(f"embed.slot.{operation.embed_slot}")
        for ref in task.fills:
            assert ref.location in slots, f"rule 3: {task.key} needs something loaded into {ref.location}"


def _needed_kv(compute: Compute | Attend, layout: Layout) -> Iterator[str]:
    """The tile's KV slot, where pages that are full already lie on a far tier."""
    if compute.kv_slot is None or compute.batch.phase == "prefill":
        return
    for rectangle, _ in layout.kv_tile(compute.layer, compute.batch.gpu_batch).slotted:
        rows = [row for row in compute.batch.rows if rectangle.first_row <= row.row < rectangle.stop_row]
        if any(row.context // layout.kv.page_tokens > rectangle.first_page for row in rows):
            yield f"kv.slot.{compute.kv_slot}"


def _check_order(order: Sequence[str], ends: nx.DiGraph[str], locations: _Locations) -> None:
    """Rules 3 and 4. A task's ancestors are the bits of one number, kept until its last successor has been visited:
    sets of keys took a gigabyte for 5700 tasks.
    """
    place = {key: index for index, key in enumerate(order)}
    demands = _demands(locations, place)
    left, ancestors = dict(ends.out_degree()), dict[str, int]()
    for key in order:
        known = 0
        for before in ends.predecessors(key):
            known |= ancestors[before]
            left[before] -= 1
            if not left[before]:
                del ancestors[before]
        for demand in demands.pop(key, []):
            missing = demand.bits & ~((known | 1 << place[key]) >> demand.lowest)
            assert not missing, demand.broken(order[demand.lowest + missing.bit_length() - 1], key)
        if left[key]:
            ancestors[key] = known | 1 << place[key]


@dataclass(frozen=True, slots=True)
class _Demand:
    """Tasks that must end before another starts: bits counted from the lowest, since they lie close together."""

    lowest: int
    bits: int
    rule: int
    version: int
    location: str

    def broken(self, earlier: str, later: str) -> str:
        if self.rule == 3:
            return f"rule 3: {later} reads version {self.version} of {self.location}, which {earlier} makes unordered"
        return f"rule 4: {later} begins version {self.version} of {self.location} while {earlier} may use the last one"


def _demands(locations: _Locations, place: Mapping[str, int]) -> dict[str, list[_Demand]]:
    """By the task that must start later."""
    demands: dict[str, list[_Demand]] = defaultdict(list)
    for location, versions in locations.items():
        for number, version in versions.items():
            demand = _Demand(*_bits(version.writers.values(), place), 3, number, location)
            for reader in version.readers:
                demands[reader].append(demand)
        for (_, last), (number, version) in pairwise(sorted(versions.items())):
            demand = _Demand(*_bits(last.all, place), 4, number, location)
            for first in version.first:
                demands[first].append(demand)
    return demands


def _bits(keys: Iterable[str], place: Mapping[str, int]) -> tuple[int, int]:
    """The lowest place of these tasks, and all of them as bits counted from it."""
    places = [place[key] for key in keys]
    lowest, bits = min(places, default=0), 0
    for index in places:
        bits |= 1 << index - lowest
    return lowest, bits


def _check_copies(tasks: Iterable[Task], layout: Layout) -> None:
    """Rule 6."""
    units = {(a.tier, a.spec.name): a.spec.num_units for a in allocations(layout)}
    for tier in layout.tiers:
        if tier.reads_store:
            placed = layout.weights.placed(tier.name)
            units |= {(tier.name, store_region(run.tensor.name)): run.tensor.num_units for run in placed}
    made: dict[tuple[str, int], list[tuple[Span, str]]] = defaultdict(list)
    for task in tasks:
        if isinstance(task.operation, Copy):
            (ref,) = task.writes
            for move in task.operation.moves:
                for span in (move.source, move.target):
                    assert 0 <= span.first < span.first + span.count <= units.get((span.tier, span.region), 0), (
                        f"rule 6: {task.key} leaves its region: {span}"
                    )
                made[ref.location, ref.version].append((move.target, task.key))
    for spans in made.values():
        _check_disjoint(spans)


def _check_disjoint(spans: Sequence[tuple[Span, str]]) -> None:
    ordered = sorted(spans, key=lambda entry: (entry[0].tier, entry[0].region, entry[0].first))
    for (one, key), (other, after) in pairwise(ordered):
        apart = (one.tier, one.region) != (other.tier, other.region) or one.first + one.count <= other.first
        assert apart, f"rule 6: {key} and {after} both fill a part of {other}"
