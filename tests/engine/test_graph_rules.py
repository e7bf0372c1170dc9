"""What `check_graph` rejects: compiled graphs with a task, an edge or an address changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, product

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compiled import MODELS, Classes, all_far, compute_of, draw_job, find, steps_of
from flexflow_engine.graph.builder import TaskGraph
from flexflow_engine.graph.check import check_graph
from flexflow_engine.graph.lanes import lane_widths
from flexflow_engine.graph.task import Copy, Task
from flexflow_engine.placement.layout import Layout
from flexflow_engine.placement.memory import memory_table
from flexflow_engine.placement.span import Span
from harness import policy
from layouts import (
    DEVICE_FAR,
    DEVICE_FAR_DISK,
    ISLAND_HOST_DISK,
    lay_out,
    setups,
)


@given(st.data(), st.sampled_from([DEVICE_FAR, DEVICE_FAR_DISK, ISLAND_HOST_DISK]))
@settings(max_examples=25)
def test_a_graph_without_one_of_its_edges_is_rejected(data: st.DataObject, classes: Classes) -> None:
    """Every edge that neither the others nor the lanes imply stands for a hazard, so each must be missed."""
    layout, graphs = draw_job(data, classes, "tied")
    graphs = graphs[:2]
    needed = needed_edges(graphs, layout)
    before, after = data.draw(st.sampled_from(needed))
    damaged = [without_edge(graph, before, after) for graph in graphs]
    with pytest.raises(AssertionError, match=r"rule [34]"):
        check_graph(damaged, layout)


def needed_edges(graphs: Sequence[TaskGraph], layout: Layout) -> list[tuple[str, str]]:
    """The edges between tasks of these graphs that no other path replaces, lanes of width 1 included."""
    tasks = {task.key: task for graph in graphs for task in graph.tasks}
    order = nx.DiGraph([edge for graph in graphs for edge in graph.digraph.edges if edge[0] in tasks])
    lanes: dict[str, list[str]] = {}
    for task in tasks.values():
        lanes.setdefault(task.lane, []).append(task.key)
    in_lanes = set[tuple[str, str]]()
    for lane, width in lane_widths(layout).items():
        keys = lanes.get(lane, [])
        in_lanes |= set(pairwise(keys)) if width == 1 else set()
    order.add_edges_from(in_lanes)
    return [edge for edge in nx.transitive_reduction(order).edges if edge not in in_lanes]


def without_edge(graph: TaskGraph, before: str, after: str) -> TaskGraph:
    digraph = graph.digraph.copy()
    if digraph.has_edge(before, after):
        digraph.remove_edge(before, after)
    return replace(graph, digraph=digraph)


def test_a_cache_slot_that_a_prompt_reuses_too_early_is_rejected() -> None:
    """A prompt's slot is begun and nothing is loaded into it: its computation is the first to touch the version."""
    layout = all_far()
    graph = steps_of(layout, count=1)[0]
    stored, reusing = find(graph, kind="store", layer=1, gpu_batch=0, name="store kv")[0], compute_of(graph, 2, 0)
    assert graph.digraph.has_edge(stored.key, reusing.key)
    with pytest.raises(AssertionError, match=r"rule 4: .*kv\.slot\.0"):
        check_graph([without_edge(graph, stored.key, reusing.key)], layout)


@pytest.mark.parametrize("classes", [DEVICE_FAR, DEVICE_FAR_DISK, ISLAND_HOST_DISK])
def test_a_graph_without_its_loads_is_rejected(classes: Classes) -> None:
    layout = all_far(classes)
    for graph in steps_of(layout):
        with pytest.raises(AssertionError, match=r"rule 3: .* which no task makes"):
            check_graph([without_tasks(graph, [task for task in graph.tasks if task.kind == "load"])], layout)


@given(st.data(), st.sampled_from([DEVICE_FAR, DEVICE_FAR_DISK, ISLAND_HOST_DISK]))
@settings(max_examples=25)
def test_a_slot_that_nothing_is_loaded_into_is_rejected(data: st.DataObject, classes: Classes) -> None:
    """All parts of one version of a slot, and nothing else, are taken away."""
    layout, graphs = draw_job(data, classes, "tied")
    graph = data.draw(st.sampled_from(graphs))
    loads = [task for task in graph.tasks if task.kind == "load"]
    if loads:
        ref = data.draw(st.sampled_from(loads)).writes[0]
        makers = [t for t in loads for made in t.writes if (made.location, made.version) == (ref.location, ref.version)]
        with pytest.raises(AssertionError, match=r"rule 3: .* which no task makes"):
            check_graph([without_tasks(graph, makers)], layout)


def test_a_slot_that_lacks_a_part_is_rejected() -> None:
    layout = all_far()
    graph = steps_of(layout)[0]
    page = find(graph, kind="load", layer=3, gpu_batch=0, name="load model")[0]
    with pytest.raises(AssertionError, match=r"rule 3: a part of .* is missing"):
        check_graph([without_tasks(graph, [page])], layout)


def test_a_computation_that_takes_an_unloaded_cache_slot_for_space_is_rejected() -> None:
    """As the builder would record it if the compiler forgot the load."""
    layout = all_far()
    graph = steps_of(layout)[1]
    tile = compute_of(graph, 2, 0)
    caches = find(graph, kind="load", layer=2, gpu_batch=0, name="load kv")
    (slot,) = (ref for ref in tile.reads if ref.location.startswith("kv.slot."))
    damaged = replaced(without_tasks(graph, caches), replace(tile, fills=(slot,)))
    with pytest.raises(AssertionError, match=r"rule 3: .* needs something loaded into kv\.slot\."):
        check_graph([damaged], layout)


def test_a_page_that_overlaps_another_is_rejected() -> None:
    layout = all_far()
    graph = steps_of(layout)[0]
    first, second = find(graph, kind="load", layer=3, gpu_batch=0, name="load model")[:2]
    start = target(first).first + target(first).count - 1
    with pytest.raises(AssertionError, match=r"rule 6: .* both fill a part of .*weights\.slot"):
        check_graph([replaced(graph, aimed(second, start))], layout)


def test_a_page_that_leaves_its_slot_is_rejected() -> None:
    layout = all_far()
    graph = steps_of(layout)[0]
    page = find(graph, kind="load", layer=3, gpu_batch=0, name="load model")[0]
    with pytest.raises(AssertionError, match=r"rule 6: .* leaves its region: .*weights\.slot"):
        check_graph([replaced(graph, aimed(page, layout.weights.slot_nbytes(layout.direct)))], layout)


def target(task: Task) -> Span:
    """Where a task's only move goes."""
    assert isinstance(task.operation, Copy)
    (move,) = task.operation.moves
    return move.target


def aimed(task: Task, first: int) -> Task:
    """The same copy, to another place of its region."""
    assert isinstance(task.operation, Copy)
    (move,) = task.operation.moves
    moves = (move._replace(target=replace(move.target, first=first)),)
    return replace(task, operation=replace(task.operation, moves=moves))


def replaced(graph: TaskGraph, task: Task) -> TaskGraph:
    """With this task instead of the one of the same key."""
    return replace(graph, tasks=tuple(task if task.key == old.key else old for old in graph.tasks))


def without_tasks(graph: TaskGraph, tasks: Sequence[Task]) -> TaskGraph:
    """Edges through the tasks that are left out are bridged, so that the order of all others stays."""
    digraph = graph.digraph.copy()
    for task in tasks:
        digraph.add_edges_from(product(list(digraph.predecessors(task.key)), list(digraph.successors(task.key))))
        digraph.remove_node(task.key)
    left = {task.key for task in tasks}
    return replace(graph, tasks=tuple(task for task in graph.tasks if task.key not in left), digraph=digraph)


def test_a_second_producer_of_a_version_is_rejected() -> None:
    layout = all_far()
    graph = steps_of(layout)[0]
    task = find(graph, kind="store", layer=1, gpu_batch=0)[0]
    twin = replace(task, key=f"{task.key} again")
    with pytest.raises(AssertionError, match="rule 2"):
        check_graph([replace(graph, tasks=(*graph.tasks, twin))], layout)


def test_a_lane_whose_order_contradicts_the_edges_is_rejected() -> None:
    layout = all_far()
    graph = steps_of(layout)[0]
    first, second = compute_of(graph, 1, 0), compute_of(graph, 2, 0)
    swapped = {first.key: second, second.key: first}
    with pytest.raises(AssertionError, match="rule 1"):
        check_graph([replace(graph, tasks=tuple(swapped.get(task.key, task) for task in graph.tasks))], layout)


def test_loads_in_a_wide_lane_that_change_places_with_their_consumers_loads_are_rejected() -> None:
    """A page of the next layer moved before the cache load of the tile that must free its slot: two lanes' cycle."""
    layout = all_far()
    graph = steps_of(layout)[0]
    page = find(graph, kind="load", layer=3, gpu_batch=0, name="load model")[0]
    moved = (page, *(task for task in graph.tasks if task is not page))
    with pytest.raises(AssertionError, match="rule 1"):
        check_graph([replace(graph, tasks=moved)], layout)


def test_a_budget_that_the_layout_exceeds_is_rejected() -> None:
    chosen = policy(setups(DEVICE_FAR), weights={"far": 100})
    layout = lay_out(MODELS["tied"], DEVICE_FAR, chosen)
    peak = memory_table(layout).peak_bytes("far")
    check_graph(steps_of(layout), lay_out(MODELS["tied"], DEVICE_FAR, chosen, budget_bytes=10 * peak))
    tight = lay_out(MODELS["tied"], DEVICE_FAR, chosen, budget_bytes=peak - 1)
    with pytest.raises(AssertionError, match=r"rule 5: .*far"):
        check_graph(steps_of(tight), tight)
