"""Compiled graphs: their order, and that `check_graph` accepts them and nothing else.

Three decoder layers (j = 1, 2, 3; 0 embeds, 4 ends, then the head), two GPU batches, everything on a far tier:

    compute   | 1,k0 | 1,k1 | 2,k0 | 2,k1 | 3,k0 | …
    far.read  | h,kv 1,k1 | w3 half | h,kv 2,k0 | w3 half | …     loads that are emitted before the computation above

Layer 2 loads beside the embedding (two slots are free then); from there on each layer loads beside the one before it.
Assertions are about emission order (every lane's order) and about paths in the graph, never about time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexflow_engine.abc.policy import TENSOR_CLASSES, Placement, TensorClass
from flexflow_engine.abc.tier import Tier
from flexflow_engine.graph import transfers
from flexflow_engine.graph.builder import TaskGraph
from flexflow_engine.graph.check import check_graph
from flexflow_engine.graph.lanes import lane_widths
from flexflow_engine.graph.task import Copy, GatherRows, Task
from flexflow_engine.placement.layout import KV_SLOTS, Layout
from flexflow_engine.placement.memory import allocations, memory_table
from flexflow_engine.placement.span import Span
from harness import policy
from layouts import (
    DEVICE_FAR,
    DEVICE_FAR_DISK,
    DEVICE_HOST_DISK,
    ISLAND_HOST,
    ISLAND_HOST_DISK,
    TIERS,
    compile_steps,
    compose,
    lay_out,
    opt,
    policies,
    setups,
)

Classes = Mapping[str, type[Tier]]

MODELS = {"tied": opt(), "untied": opt(tie_word_embeddings=False, word_embed_proj_dim=32, do_layer_norm_before=False)}


def all_far(classes: Classes = DEVICE_FAR, *, num_gpu_batches: int = 2, kv_page_tokens: int = 4) -> Layout:
    """Two rows a GPU batch, every class on the last tier."""
    last = {list(classes)[-1]: 100.0}
    chosen = policy(
        setups(classes),
        gpu_batch_size=2,
        num_gpu_batches=num_gpu_batches,
        weights=last,
        kv_cache=last,
        activations=last,
        kv_page_tokens=kv_page_tokens,
    )
    return lay_out(MODELS["tied"], classes, chosen, prompt_tokens=(9,) * 2 * num_gpu_batches)


def steps_of(layout: Layout, count: int = 3) -> list[TaskGraph]:
    rows = layout.policy.gpu_batch_size * layout.policy.num_gpu_batches
    return compile_steps(layout, compose(layout, (9,) * rows, 6, limit=count))


def check(graphs: Sequence[TaskGraph], layout: Layout) -> None:
    check_graph(graphs, layout)


def find(graph: TaskGraph, *, kind: str, layer: int, gpu_batch: int, name: str = "") -> list[Task]:
    """The tasks of a tile in emission order; `name` is how their names begin."""
    return [
        task
        for task in graph.tasks
        if (task.kind, task.tile.layer, task.tile.gpu_batch) == (kind, layer, gpu_batch)
        and task.key.split("/", 3)[3].startswith(name)
    ]


def compute_of(graph: TaskGraph, layer: int, gpu_batch: int) -> Task:
    (task,) = find(graph, kind="compute", layer=layer, gpu_batch=gpu_batch)
    return task


def test_a_tiles_loads_end_before_its_computation_and_its_stores_begin_after_it() -> None:
    layout = all_far()
    for graph in steps_of(layout):
        for j in (1, 2, 3):
            for k in (0, 1):
                ancestors = nx.ancestors(graph.digraph, compute_of(graph, j, k).key)
                descendants = nx.descendants(graph.digraph, compute_of(graph, j, k).key)
                inputs = find(graph, kind="load", layer=j, gpu_batch=k, name="load hidden")
                inputs += find(graph, kind="load", layer=j, gpu_batch=k, name="load kv")
                weights = [
                    task for b in (0, 1) for task in find(graph, kind="load", layer=j, gpu_batch=b, name="load model")
                ]
                assert len(inputs) == (2 if graph.step else 1)
                assert weights
                assert {task.key for task in (*inputs, *weights)} <= ancestors
                assert {task.key for task in find(graph, kind="store", layer=j, gpu_batch=k)} <= descendants


@pytest.mark.parametrize("num_gpu_batches", [2, 3, 5])
@pytest.mark.parametrize("classes", [DEVICE_FAR, DEVICE_HOST_DISK, ISLAND_HOST_DISK])
def test_the_next_layers_pages_are_spread_over_all_gpu_batches(classes: Classes, num_gpu_batches: int) -> None:
    layout = all_far(classes, num_gpu_batches=num_gpu_batches)
    for graph in steps_of(layout):
        place = {task.key: index for index, task in enumerate(graph.tasks)}
        pages = [find(graph, kind="load", layer=3, gpu_batch=k, name="load model") for k in range(num_gpu_batches)]
        moves = [sum(len(task.operation.moves) for task in part if isinstance(task.operation, Copy)) for part in pages]
        assert max(moves) - min(moves) <= 1
        assert sum(moves) == len(layout.weights.page_order(layout.weights.layers[3], layout.direct))
        for k, part in enumerate(pages):
            after = place[compute_of(graph, 2, k - 1).key if k else compute_of(graph, 1, num_gpu_batches - 1).key]
            assert all(after < place[task.key] < place[compute_of(graph, 2, k).key] for task in part)


def test_pages_that_follow_each_other_at_both_ends_are_one_move() -> None:
    """A layer's, all of them in host memory: those of a GPU batch, tensor by tensor. A page's bytes go where they did
    page by page.
    """
    layout = all_far(ISLAND_HOST)
    order = layout.weights.page_order(layout.weights.layers[3], layout.direct)
    joined = 0
    for k, share in enumerate((order[: len(order) // 2], order[len(order) // 2 :])):
        (load,) = find(steps_of(layout)[1], kind="load", layer=3, gpu_batch=k, name="load model")
        firsts = {run.region: (run, page, offset) for run, page, offset in reversed(share)}
        moves = {move.source.region: move for move in copied(load).moves}
        assert moves.keys() == firsts.keys()
        for region, (run, page, offset) in firsts.items():
            source, target, pages = moves[region].source, moves[region].target, [p for r, p, _ in share if r is run]
            assert (source.first, target.first) == (page.first_unit - run.first_unit, offset)
            assert source.count == sum(one.num_units for one in pages)
            assert target.count == sum(one.nbytes for one in pages)
            joined += len(pages) - 1
    assert joined == 3


def test_pages_are_not_joined_where_several_threads_load_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ISLAND_HOST["host"], "read_concurrency", 2)
    layout = all_far(ISLAND_HOST)
    order = layout.weights.page_order(layout.weights.layers[3], layout.direct)
    loads = [t for k in (0, 1) for t in find(steps_of(layout)[1], kind="load", layer=3, gpu_batch=k, name="load model")]
    assert sum(len(copied(task).moves) for task in loads) == len(order)


def copied(task: Task) -> Copy:
    assert isinstance(task.operation, Copy)
    return task.operation


def test_the_next_tiles_cache_loads_before_the_current_computation() -> None:
    layout = all_far()
    prompts, *decodes = steps_of(layout)
    assert not [task for task in prompts.tasks if task.kind == "load" and "load kv" in task.key]
    for graph in decodes:
        place = {task.key: index for index, task in enumerate(graph.tasks)}
        tiles = [(j, k) for j in (1, 2, 3) for k in (0, 1)]
        for (j, k), (following, batch) in pairwise(tiles):
            (cache,) = find(graph, kind="load", layer=following, gpu_batch=batch, name="load kv")
            assert place[cache.key] < place[compute_of(graph, j, k).key]
            assert compute_of(graph, j, k).key not in nx.ancestors(graph.digraph, cache.key)


def test_the_first_tiles_caches_load_before_rows_of_the_steps_tokens() -> None:
    """Those rows wait for tokens, and what comes after them in their lane waits with them."""
    for graph in steps_of(all_far(num_gpu_batches=3))[1:]:
        place = {task.key: index for index, task in enumerate(graph.tasks)}
        (rows, *_) = find(graph, kind="load", layer=0, gpu_batch=0)
        caches = [find(graph, kind="load", layer=1, gpu_batch=k, name="load kv")[0] for k in range(3)]
        assert isinstance(rows.operation, GatherRows)
        assert [place[cache.key] < place[rows.key] for cache in caches] == [True] * KV_SLOTS + [False]


@pytest.mark.parametrize("classes", [DEVICE_FAR, DEVICE_FAR_DISK, ISLAND_HOST_DISK])
def test_steps_with_prompts_of_some_and_tokens_of_others_are_legal(classes: Classes) -> None:
    """One GPU batch after the other is given to new sequences, while the other two go on."""
    layout = all_far(classes, num_gpu_batches=3)
    prompts, new_tokens = (9, 9, 8, 8, 7, 7, 6, 6, 5, 5), (2, 2, 4, 4, 7, 7, 5, 5, 2, 2)
    steps = compose(layout, prompts, new_tokens)
    phases = {tuple(batch.phase for batch in step.batches) for step in steps}
    assert {("prefill", "decode", "decode"), ("decode", "prefill", "decode")} <= phases
    for pair in pairwise(compile_steps(layout, steps)):
        check(pair, layout)


def test_what_a_step_stores_the_next_loads_by_a_carried_edge() -> None:
    prompts, first, _ = steps_of(all_far())
    for j in (1, 2, 3):
        for k in (0, 1):
            (stored,) = find(prompts, kind="store", layer=j, gpu_batch=k, name="store kv")
            (loaded,) = find(first, kind="load", layer=j, gpu_batch=k, name="load kv")
            assert stored.key in first.digraph.predecessors(loaded.key)
            assert "task" not in first.digraph.nodes[stored.key]
            assert loaded.reads == stored.writes


def test_sampled_tokens_reach_the_next_steps_embedding_by_a_carried_edge() -> None:
    prompts, first, _ = steps_of(all_far())
    for k in (0, 1):
        (fetched,) = (task for task in prompts.tasks if task.lane == "tokens" and task.tile.gpu_batch == k)
        gathers = find(first, kind="load", layer=0, gpu_batch=k)
        assert len(gathers) == 1
        assert fetched.key in nx.ancestors(first.digraph, gathers[0].key)


def test_the_next_steps_first_layers_load_before_this_steps_last_computations() -> None:
    _, second, third = steps_of(all_far())
    joined: nx.DiGraph[str] = nx.DiGraph()
    joined.add_edges_from([*second.digraph.edges, *third.digraph.edges])
    head = [task for task in second.tasks if task.kind == "compute"][-2:]
    assert [task.tile.gpu_batch for task in head] == [0, 1]
    first_page = find(third, kind="load", layer=1, gpu_batch=0, name="load model")[0]
    ancestors = nx.ancestors(joined, first_page.key)
    assert ancestors.isdisjoint(task.key for task in head)


def test_steps_before_the_last_are_not_carried_however_long_a_page_is_read() -> None:
    """Rows are given to new sequences after 20 steps; the first pages of the old ones were read in each of them."""
    shares = {"far": 40.0, "disk": 60.0}
    chosen = policy(setups(DEVICE_FAR_DISK), gpu_batch_size=1, num_gpu_batches=3, kv_cache=shares)
    layout = lay_out(MODELS["tied"], DEVICE_FAR_DISK, chosen, prompt_tokens=(9,) * 6, max_new_tokens=20)
    graphs = compile_steps(layout, compose(layout, (9,) * 6, 20))
    assert len(graphs) == 40
    for graph in graphs[1:]:
        carried = {int(key.split("/")[0]) for key in graph.digraph if "task" not in graph.digraph.nodes[key]}
        assert carried == {graph.step - 1}


def test_a_step_is_legal_without_the_steps_before_it() -> None:
    layout = all_far()
    for graph in steps_of(layout):
        check([graph], layout)


def test_what_several_threads_can_load_of_a_tiles_cache_is_several_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = all_far()
    whole = steps_of(layout)[2]
    monkeypatch.setattr(transfers, "TASK_NBYTES", 2 * layout.kv.page_nbytes)
    graphs = steps_of(layout)
    check(graphs, layout)
    (load,) = find(whole, kind="load", layer=2, gpu_batch=1, name="load kv")
    loads = find(graphs[2], kind="load", layer=2, gpu_batch=1, name="load kv")
    assert [task.nbytes for task in loads] == [2 * layout.kv.page_nbytes] * 4
    assert sorted(units for task in loads for units in moved_units(task)) == sorted(moved_units(load))


def moved_units(task: Task) -> list[tuple[str, int, int]]:
    """Region of each unit that a copy moves, its place there, and where it comes to."""
    assert isinstance(task.operation, Copy)
    return [
        (move.source.region, move.source.first + n, move.target.first + n)
        for move in task.operation.moves
        for n in range(move.source.count)
    ]


def test_a_decode_step_stores_only_the_pages_that_it_filled() -> None:
    graphs = steps_of(all_far(), count=6)  # 9 prompt tokens: pages of 4 are full at 4, 8 (both of the prompt) and 12
    stores = [len([task for task in graph.tasks if "/store kv" in task.key]) for graph in graphs]
    assert stores == [6, 0, 0, 6, 0, 0]


def test_pages_that_adjoining_rows_fill_in_one_step_are_one_move_of_keys_and_one_of_values() -> None:
    chosen = policy(setups(DEVICE_FAR), gpu_batch_size=3, num_gpu_batches=1, kv_cache={"far": 100.0})
    layout = lay_out(MODELS["tied"], DEVICE_FAR, chosen, prompt_tokens=(9, 9, 8), max_new_tokens=8)
    graphs = compile_steps(layout, compose(layout, (9, 9, 8), 8))
    stores = [task for graph in graphs[1:] for task in graph.tasks if "/store kv" in task.key and task.tile.layer == 1]
    counts = [
        [move.target.count for move in task.operation.moves] for task in stores if isinstance(task.operation, Copy)
    ]
    assert counts == [[2, 2], [1, 1], [2, 2]]  # at 12 and 16 tokens the first two rows, and the third one between


@pytest.mark.parametrize("moved", [None, *TENSOR_CLASSES])
def test_a_job_only_computes_whose_graphs_have_no_loads_and_no_stores(moved: TensorClass | None) -> None:
    in_place = policy(setups(DEVICE_FAR), gpu_batch_size=2, num_gpu_batches=1)
    halves: dict[str, Any] = {moved: Placement((("device", 50.0), ("far", 50.0)))} if moved else {}
    layout = lay_out(MODELS["tied"], DEVICE_FAR, replace(in_place, **halves), prompt_tokens=(9,) * 2)
    tasks = [task for graph in steps_of(layout) for task in graph.tasks]
    copies = [task for task in tasks if isinstance(task.operation, Copy | GatherRows)]
    assert layout.only_computes == (moved is None) == (not copies)


def test_a_job_does_not_only_compute_whose_attention_runs_beside() -> None:
    apart = policy(setups(DEVICE_HOST_DISK), kv_cache={"host": 100}, attention="host")
    layout = lay_out(MODELS["tied"], DEVICE_HOST_DISK, apart)
    tasks = [task for graph in steps_of(layout) for task in graph.tasks]
    assert not any(isinstance(task.operation, Copy | GatherRows) for task in tasks)
    assert not layout.only_computes


def test_what_needs_no_copy_is_not_copied() -> None:
    chosen = policy(setups(DEVICE_HOST_DISK), weights={"host": 100}, kv_cache={"host": 100}, activations={"host": 100})
    layout = lay_out(MODELS["tied"], DEVICE_HOST_DISK, chosen)
    graphs = steps_of(layout)
    assert {task.kind for graph in graphs for task in graph.tasks} == {"compute", "store"}
    assert {task.lane for graph in graphs for task in graph.tasks} == {"compute", "tokens"}


def test_an_island_is_reached_through_staging_slots() -> None:
    graphs = steps_of(all_far(ISLAND_HOST_DISK))
    disk = [task for graph in graphs for task in graph.tasks if task.lane.startswith("disk.")]
    assert disk
    reads = [task for task in disk if task.kind == "load"]
    assert all(ref.location.startswith("staging.") for task in reads for ref in task.writes)
    assert all(ref.location.startswith("staging.") for task in disk if task.kind == "store" for ref in task.reads)


def test_staging_slots_are_allocated_where_something_passes_through_them() -> None:
    resident = lay_out(MODELS["tied"], ISLAND_HOST, policy(setups(ISLAND_HOST)))
    for layout in (all_far(ISLAND_HOST_DISK), all_far(ISLAND_HOST), resident):
        allocated = {each.spec.name for each in allocations(layout) if each.what == "staging"}
        tasks = [task for graph in steps_of(layout) for task in graph.tasks]
        used = {ref.location for task in tasks for ref in (*task.reads, *task.writes)}
        assert allocated == {location for location in used if location.startswith("staging.")}


@given(st.data(), st.sampled_from(TIERS), st.sampled_from(sorted(MODELS)))
@settings(max_examples=40)
def test_compiled_graphs_are_legal(data: st.DataObject, classes: Classes, model: str) -> None:
    layout, graphs = draw_job(data, classes, model)
    check(graphs[:1], layout)
    for adjoining in pairwise(graphs):
        check(adjoining, layout)


@given(st.data(), st.sampled_from(TIERS))
@settings(max_examples=40)
def test_emission_order_is_topological_and_keys_are_unique(data: st.DataObject, classes: Classes) -> None:
    _, graphs = draw_job(data, classes, "tied")
    place = {task.key: index for index, task in enumerate(task for graph in graphs for task in graph.tasks)}
    assert len(place) == sum(len(graph.tasks) for graph in graphs)
    for graph in graphs:
        assert all(place[before] < place[after] for before, after in graph.digraph.edges)


def draw_job(data: st.DataObject, classes: Classes, model: str) -> tuple[Layout, list[TaskGraph]]:
    chosen = data.draw(policies(classes))
    prompts = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=12))
    max_new_tokens = data.draw(st.integers(1, 5))
    layout = lay_out(MODELS[model], classes, chosen, prompt_tokens=prompts, max_new_tokens=max_new_tokens)
    return layout, compile_steps(layout, compose(layout, prompts, max_new_tokens, limit=4))


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
        check(damaged, layout)


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
        check([without_edge(graph, stored.key, reusing.key)], layout)


@pytest.mark.parametrize("classes", [DEVICE_FAR, DEVICE_FAR_DISK, ISLAND_HOST_DISK])
def test_a_graph_without_its_loads_is_rejected(classes: Classes) -> None:
    layout = all_far(classes)
    for graph in steps_of(layout):
        with pytest.raises(AssertionError, match=r"rule 3: .* which no task makes"):
            check([without_tasks(graph, [task for task in graph.tasks if task.kind == "load"])], layout)


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
            check([without_tasks(graph, makers)], layout)


def test_a_slot_that_lacks_a_part_is_rejected() -> None:
    layout = all_far()
    graph = steps_of(layout)[0]
    page = find(graph, kind="load", layer=3, gpu_batch=0, name="load model")[0]
    with pytest.raises(AssertionError, match=r"rule 3: a part of .* is missing"):
        check([without_tasks(graph, [page])], layout)


def test_a_computation_that_takes_an_unloaded_cache_slot_for_space_is_rejected() -> None:
    """As the builder would record it if the compiler forgot the load."""
    layout = all_far()
    graph = steps_of(layout)[1]
    tile = compute_of(graph, 2, 0)
    caches = find(graph, kind="load", layer=2, gpu_batch=0, name="load kv")
    (slot,) = (ref for ref in tile.reads if ref.location.startswith("kv.slot."))
    damaged = replaced(without_tasks(graph, caches), replace(tile, fills=(slot,)))
    with pytest.raises(AssertionError, match=r"rule 3: .* needs something loaded into kv\.slot\."):
        check([damaged], layout)


def test_what_a_computation_fills_is_marked() -> None:
    """A prompt's cache slot, and rows of a table that lies on the compute tier; never weights or hidden states."""
    table_near = lay_out(MODELS["tied"], DEVICE_FAR, policy(setups(DEVICE_FAR), kv_cache={"far": 100}))
    for layout, kinds in ((all_far(), {"kv"}), (table_near, {"kv", "embed"})):
        prompts, decode, *_ = steps_of(layout)
        assert {ref.location.split(".")[0] for task in prompts.tasks for ref in task.fills} == kinds
        assert {ref.location.split(".")[0] for task in decode.tasks for ref in task.fills} == kinds - {"kv"}


def test_a_page_that_overlaps_another_is_rejected() -> None:
    layout = all_far()
    graph = steps_of(layout)[0]
    first, second = find(graph, kind="load", layer=3, gpu_batch=0, name="load model")[:2]
    start = target(first).first + target(first).count - 1
    with pytest.raises(AssertionError, match=r"rule 6: .* both fill a part of .*weights\.slot"):
        check([replaced(graph, aimed(second, start))], layout)


def test_a_page_that_leaves_its_slot_is_rejected() -> None:
    layout = all_far()
    graph = steps_of(layout)[0]
    page = find(graph, kind="load", layer=3, gpu_batch=0, name="load model")[0]
    with pytest.raises(AssertionError, match=r"rule 6: .* leaves its region: .*weights\.slot"):
        check([replaced(graph, aimed(page, layout.weights.slot_nbytes(layout.direct)))], layout)


def target(task: Task) -> Span:
    """Where a task's only move goes."""
    assert isinstance(task.operation, Copy)
    (move,) = task.operation.moves
    return move.target


def aimed(task: Task, first: int) -> Task:
    """The same copy, to another place of its region."""
    assert isinstance(task.operation, Copy)
    (move,) = task.operation.moves
    moves = (replace(move, target=replace(move.target, first=first)),)
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
        check([replace(graph, tasks=(*graph.tasks, twin))], layout)


def test_a_lane_whose_order_contradicts_the_edges_is_rejected() -> None:
    layout = all_far()
    graph = steps_of(layout)[0]
    first, second = compute_of(graph, 1, 0), compute_of(graph, 2, 0)
    swapped = {first.key: second, second.key: first}
    with pytest.raises(AssertionError, match="rule 1"):
        check([replace(graph, tasks=tuple(swapped.get(task.key, task) for task in graph.tasks))], layout)


def test_loads_in_a_wide_lane_that_change_places_with_their_consumers_loads_are_rejected() -> None:
    """A page of the next layer moved before the cache load of the tile that must free its slot: two lanes' cycle."""
    layout = all_far()
    graph = steps_of(layout)[0]
    page = find(graph, kind="load", layer=3, gpu_batch=0, name="load model")[0]
    moved = (page, *(task for task in graph.tasks if task is not page))
    with pytest.raises(AssertionError, match="rule 1"):
        check([replace(graph, tasks=moved)], layout)


def test_a_budget_that_the_layout_exceeds_is_rejected() -> None:
    chosen = policy(setups(DEVICE_FAR), weights={"far": 100})
    layout = lay_out(MODELS["tied"], DEVICE_FAR, chosen)
    peak = memory_table(layout).peak_bytes("far")
    check(steps_of(layout), lay_out(MODELS["tied"], DEVICE_FAR, chosen, budget_bytes=10 * peak))
    tight = lay_out(MODELS["tied"], DEVICE_FAR, chosen, budget_bytes=peak - 1)
    with pytest.raises(AssertionError, match=r"rule 5: .*far"):
        check(steps_of(tight), tight)
