"""Compiled graphs: their order, and that `check_graph` accepts them; what it rejects is in `test_graph_rules`.

Three decoder layers (j = 1, 2, 3; 0 embeds, 4 ends, then the head), two GPU batches, everything on a far tier:

    compute   | 1,k0 | 1,k1 | 2,k0 | 2,k1 | 3,k0 | …
    far.read  | h,kv 1,k1 | w3 half | h,kv 2,k0 | w3 half | …     loads that are emitted before the computation above

Layer 2 loads beside the embedding (two slots are free then); from there on each layer loads beside the one before it.
Assertions are about emission order (every lane's order) and about paths in the graph, never about time.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compiled import MODELS, Classes, all_far, compute_of, draw_job, find, steps_of
from flexflow_engine.abc.policy import TENSOR_CLASSES, Placement, TensorClass
from flexflow_engine.graph import transfers
from flexflow_engine.graph.check import check_graph
from flexflow_engine.graph.task import Copy, GatherRows, Task
from flexflow_engine.placement.layout import KV_SLOTS
from flexflow_engine.placement.memory import allocations
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
    setups,
)


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
        check_graph(pair, layout)


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
        check_graph([graph], layout)


def test_what_several_threads_can_load_of_a_tiles_cache_is_several_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = all_far()
    whole = steps_of(layout)[2]
    monkeypatch.setattr(transfers, "TASK_NBYTES", 2 * layout.kv.page_nbytes)
    graphs = steps_of(layout)
    check_graph(graphs, layout)
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
    check_graph(graphs[:1], layout)
    for adjoining in pairwise(graphs):
        check_graph(adjoining, layout)


@given(st.data(), st.sampled_from(TIERS))
@settings(max_examples=40)
def test_emission_order_is_topological_and_keys_are_unique(data: st.DataObject, classes: Classes) -> None:
    _, graphs = draw_job(data, classes, "tied")
    place = {task.key: index for index, task in enumerate(task for graph in graphs for task in graph.tasks)}
    assert len(place) == sum(len(graph.tasks) for graph in graphs)
    for graph in graphs:
        assert all(place[before] < place[after] for before, after in graph.digraph.edges)


def test_what_a_computation_fills_is_marked() -> None:
    """A prompt's cache slot, and rows of a table that lies on the compute tier; never weights or hidden states."""
    table_near = lay_out(MODELS["tied"], DEVICE_FAR, policy(setups(DEVICE_FAR), kv_cache={"far": 100}))
    for layout, kinds in ((all_far(), {"kv"}), (table_near, {"kv", "embed"})):
        prompts, decode, *_ = steps_of(layout)
        assert {ref.location.split(".")[0] for task in prompts.tasks for ref in task.fills} == kinds
        assert {ref.location.split(".")[0] for task in decode.tasks for ref in task.fills} == kinds - {"kv"}
