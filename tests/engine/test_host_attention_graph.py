"""Graphs of steps whose attention is on the host. Three decoder layers (j = 1, 2, 3), GPU batches k:

    compute    | inputs 1,k0 | inputs 1,k1 | output 1,k0 | inputs 2,k0 | output 1,k1 | ...
    attention                | attend 1,k0               | attend 1,k1               | ...

Assertions are about emission order (every lane's order) and about paths in the graph, never about time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

import networkx as nx
import pytest

from flexflow_engine.abc.codec import Codec
from flexflow_engine.abc.policy import AttentionPlace
from flexflow_engine.abc.tier import Tier
from flexflow_engine.errors import PolicyError
from flexflow_engine.graph.builder import TaskGraph
from flexflow_engine.graph.check import check_graph
from flexflow_engine.graph.lanes import lane_widths
from flexflow_engine.graph.task import ATTENTION_LANE, Attend, AttentionInputs, AttentionOutput, Copy, Operation, Task
from flexflow_engine.placement.layout import Layout
from flexflow_engine.placement.memory import memory_table
from flexflow_plugins.codecs.group_quant import GroupInt8Codec
from flexflow_plugins.codecs.none import NoneCodec
from harness import policy
from layouts import (
    DEVICE_FAR,
    DEVICE_FAR_DISK,
    DEVICE_HOST_DISK,
    ISLAND_HOST_DISK,
    compile_steps,
    compose,
    lay_out,
    opt,
    setups,
)

Classes = Mapping[str, type[Tier]]


def on_host(
    classes: Classes = ISLAND_HOST_DISK,
    *,
    num_gpu_batches: int = 3,
    attention: AttentionPlace = "host",
    kv_cache: Mapping[str, float] | None = None,
    weight_codec: Codec | None = None,
) -> Layout:
    """Two rows a GPU batch; weights and hidden states on the second tier, the cache there too unless told otherwise."""
    second = {list(classes)[1]: 100.0}
    chosen = policy(
        setups(classes),
        gpu_batch_size=2,
        num_gpu_batches=num_gpu_batches,
        weights=second,
        kv_cache=kv_cache or second,
        activations=second,
        attention=attention,
    )
    prompts = (9,) * 2 * num_gpu_batches
    return lay_out(opt(), classes, chosen, prompt_tokens=prompts, weight_codec=weight_codec)


def steps_of(layout: Layout, count: int = 3) -> list[TaskGraph]:
    """The prompts' step, and decode steps."""
    rows = layout.policy.gpu_batch_size * layout.policy.num_gpu_batches
    return compile_steps(layout, compose(layout, (9,) * rows, 6, limit=count))


def task_of(graph: TaskGraph, operation: type[Operation], layer: int, gpu_batch: int) -> Task:
    place = (layer, gpu_batch)
    (task,) = (
        t for t in graph.tasks if isinstance(t.operation, operation) and (t.tile.layer, t.tile.gpu_batch) == place
    )
    return task


@pytest.mark.parametrize("num_gpu_batches", [2, 3, 4])
@pytest.mark.parametrize("classes", [ISLAND_HOST_DISK, DEVICE_HOST_DISK, DEVICE_FAR_DISK])
def test_the_host_attends_beside_the_next_tiles_inputs(classes: Classes, num_gpu_batches: int) -> None:
    """Neither waits for the other, and the compute lane comes to the inputs before it needs what is attended to."""
    layout = on_host(classes, num_gpu_batches=num_gpu_batches)
    tiles = [(j, k) for j in (1, 2, 3) for k in range(num_gpu_batches)]
    for graph in steps_of(layout)[1:]:
        place = {task.key: index for index, task in enumerate(graph.tasks)}
        for (j, k), following in pairwise(tiles):
            attend, output = task_of(graph, Attend, j, k), task_of(graph, AttentionOutput, j, k)
            inputs = task_of(graph, AttentionInputs, *following)
            assert place[inputs.key] < place[output.key]
            assert inputs.key not in nx.ancestors(graph.digraph, attend.key)
            assert attend.key not in nx.ancestors(graph.digraph, inputs.key)


def test_a_tiles_parts_follow_each_other() -> None:
    graph = steps_of(on_host())[1]
    for j in (1, 2, 3):
        for k in (0, 1, 2):
            parts = [task_of(graph, part, j, k).key for part in (AttentionInputs, Attend, AttentionOutput)]
            assert all(before in nx.ancestors(graph.digraph, after) for before, after in pairwise(parts))


def test_one_gpu_batch_is_a_tile_after_another() -> None:
    layout = on_host(num_gpu_batches=1)
    for graph in steps_of(layout)[1:]:
        for j in (1, 2):
            output, inputs = task_of(graph, AttentionOutput, j, 0), task_of(graph, AttentionInputs, j + 1, 0)
            assert output.key in nx.ancestors(graph.digraph, inputs.key)


def test_a_layers_matrices_are_decoded_after_the_last_outputs_of_the_layer_before() -> None:
    """There is one buffer of decoded weights."""
    layout = on_host(weight_codec=GroupInt8Codec())
    graphs = steps_of(layout)
    check_graph(graphs, layout)
    for graph in graphs[1:]:
        for j in (1, 2):
            inputs = task_of(graph, AttentionInputs, j + 1, 0)
            assert task_of(graph, AttentionOutput, j, 2).key in nx.ancestors(graph.digraph, inputs.key)


@pytest.mark.parametrize("kv_cache", [{"host": 100.0}, {"disk": 100.0}, {"host": 50.0, "disk": 50.0}])
def test_queries_cross_the_link_and_pages_of_the_cache_do_not(kv_cache: Mapping[str, float]) -> None:
    layout = on_host(kv_cache=kv_cache)
    tokens = layout.policy.gpu_batch_size
    for graph in steps_of(layout)[1:]:
        crossing = [task for task in graph.tasks if isinstance(task.operation, Copy) and _crosses(task)]
        assert not [task for task in crossing if _regions(task, "kv.")]
        sent = [task.nbytes for task in crossing if _regions(task, "attention.")]
        assert sorted(sent) == sorted([64 * 4 * tokens, 3 * 64 * 4 * tokens] * 9)  # 64 numbers a query, in float32
        read = [task for task in graph.tasks if task.lane == "disk.read"]
        assert bool(read) == ("disk" in kv_cache)


def _crosses(task: Task) -> bool:
    assert isinstance(task.operation, Copy)
    return any("island" in {move.source.tier, move.target.tier} for move in task.operation.moves)


def _regions(task: Task, prefix: str) -> bool:
    assert isinstance(task.operation, Copy)
    return any(move.source.region.startswith(prefix) for move in task.operation.moves)


def test_a_compute_tier_in_host_memory_shares_the_attention_slots() -> None:
    layout = on_host(DEVICE_HOST_DISK)
    lanes = {task.lane for graph in steps_of(layout) for task in graph.tasks}
    assert lanes == {"compute", "attention", "tokens"}


def test_the_lane_is_there_when_the_host_attends() -> None:
    assert lane_widths(on_host())[ATTENTION_LANE] == 1
    assert ATTENTION_LANE not in lane_widths(on_host(attention="device"))


def test_work_is_counted_once_wherever_attention_runs() -> None:
    host, device = (steps_of(on_host(attention=place)) for place in ("host", "device"))
    for one, other in zip(host, device, strict=True):
        assert sum(task.flops for task in one.tasks) == sum(task.flops for task in other.tasks)
    attended = task_of(host[1], Attend, 1, 0)
    assert attended.flops == 4 * 64 * 2 * 10  # two rows of nine cached tokens and a new one
    assert attended.nbytes == 2 * 2 * 10 * 64 * 4


def test_tails_slots_and_workspace_of_attention_lie_on_the_host() -> None:
    table = memory_table(on_host(kv_cache={"disk": 100.0}))
    lines = {tier: {line.what for line in table.lines if line.tier == tier} for tier in ("island", "host")}
    assert {"kv tails", "kv slots", "attention slots", "workspace"} <= lines["host"]
    assert lines["island"].isdisjoint({"kv tails", "kv slots", "kv_cache"})
    assert {"attention slots", "prompt slots"} <= lines["island"]


def test_a_cache_that_the_host_reads_in_place_needs_no_tails() -> None:
    whats = {line.what for line in memory_table(on_host()).lines}
    assert whats.isdisjoint({"kv tails", "kv slots"})


def test_a_cache_on_the_compute_tier_is_refused() -> None:
    with pytest.raises(PolicyError, match=r"scheduler\.kv_cache: .* lies on island"):
        on_host(kv_cache={"island": 1.0, "host": 99.0})


def test_attention_on_the_host_needs_memory_that_the_host_computes_on() -> None:
    island, far = ISLAND_HOST_DISK["island"], DEVICE_FAR["far"]
    with pytest.raises(PolicyError, match="needs a tier in host memory"):
        on_host({"island": island, "far": far})


def test_an_output_that_takes_what_was_not_attended_to_is_rejected() -> None:
    """As the builder would record it if the attended values were never loaded."""
    layout = on_host()
    graph = steps_of(layout)[1]
    inputs, output = task_of(graph, AttentionInputs, 2, 1), task_of(graph, AttentionOutput, 2, 1)
    reads = tuple(inputs.writes[0] if r.location == inputs.writes[0].location else r for r in output.reads)
    with pytest.raises(AssertionError, match=r"rule 7: .*output.* takes what .*inputs.* left"):
        check_graph([_replaced(graph, replace(output, reads=reads))], layout)


def test_hidden_states_of_another_tile_are_rejected() -> None:
    """A slot that is loaded again before the tile in it has been ended."""
    layout = on_host()
    graph = steps_of(layout)[1]
    other, output = task_of(graph, AttentionInputs, 2, 0), task_of(graph, AttentionOutput, 2, 1)
    (wrong,) = (ref for ref in other.reads if ref.location.startswith("hidden.slot."))
    reads = tuple(wrong if ref.location.startswith("hidden.slot.") else ref for ref in output.reads)
    with pytest.raises(AssertionError, match=r"rule 7: .*output.* finds in hidden\.slot\.. what .* made"):
        check_graph([_replaced(graph, replace(output, reads=reads))], layout)


def _replaced(graph: TaskGraph, task: Task) -> TaskGraph:
    return replace(graph, tasks=tuple(task if task.key == old.key else old for old in graph.tasks))


@pytest.mark.parametrize("codec", [NoneCodec(), GroupInt8Codec()], ids=lambda codec: codec.key)
@pytest.mark.parametrize("num_gpu_batches", [1, 2, 3, 5])
def test_steps_that_mix_prompts_and_tokens_are_legal(codec: Codec, num_gpu_batches: int) -> None:
    layout = on_host(num_gpu_batches=num_gpu_batches, kv_cache={"host": 30.0, "disk": 70.0}, weight_codec=codec)
    lengths = [1 + n % 9 for n in range(4 * num_gpu_batches + 1)]
    for adjoining in pairwise(compile_steps(layout, compose(layout, lengths, 3))):
        check_graph(adjoining, layout)
