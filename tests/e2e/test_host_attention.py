"""Attention on the host: the same tokens wherever the cache lies, and host and compute tier at work at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from threading import Barrier

import pytest

from flexflow_engine.abc.codec import Codec
from flexflow_engine.abc.policy import Policy
from flexflow_engine.abc.tier import Tier
from flexflow_engine.graph.task import ATTENTION_LANE, Attend, AttentionInputs, Copy, Operation, Task
from flexflow_engine.placement.memory import allocations
from flexflow_engine.runtime.executor import DataflowExecutor, RunTask
from flexflow_engine.runtime.trace import TaskEvent
from flexflow_engine.testing.async_tier import StreamIslandTier
from flexflow_plugins.codecs.group_quant import GroupInt4Codec, GroupInt8Codec
from flexflow_plugins.codecs.none import NoneCodec
from flexflow_tiers.pinned import PinnedTier
from flexflow_tiers.zarr import ZarrTier
from harness import JobResult, policy, random_prompts, reference_tokens, run_job, save_opt
from layouts import DEVICE_FAR_DISK, DEVICE_HOST_DISK, ISLAND_HOST_DISK, disk_setups, setups
from watched import with_run

Classes = Mapping[str, type[Tier]]
Tokens = Mapping[int, tuple[int, ...]]

STREAM_HOST_DISK: Classes = {"island": StreamIslandTier, "host": PinnedTier, "disk": ZarrTier}
MACHINES: Mapping[str, Classes] = {
    "in host memory": DEVICE_HOST_DISK,
    "behind a link": ISLAND_HOST_DISK,
    "behind a link that is late": STREAM_HOST_DISK,
    "beside memory that nothing computes on": DEVICE_FAR_DISK,
}
CACHES = [(100.0, 0.0), (0.0, 100.0), (40.0, 60.0)]
"""Percent on the second tier and on the disk."""
PROMPTS = random_prompts(11, seed=4, longest=20)
"""More than three batches of two hold, and of many lengths."""
MAX_NEW_TOKENS = 7


class Jobs:
    """One checkpoint, and jobs on it whose attention is on the host."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.checkpoint = save_opt(root / "checkpoint", num_hidden_layers=2)
        self.expected = reference_tokens(self.checkpoint, PROMPTS, max_new_tokens=MAX_NEW_TOKENS)

    def run(
        self,
        classes: Classes,
        chosen: Policy,
        *,
        eos: tuple[int, ...] = (),
        weight_codec: Codec | None = None,
        kv_codec: Codec | None = None,
    ) -> JobResult:
        return run_job(
            self.checkpoint,
            disk_setups(classes, self._root / "disk"),
            chosen,
            PROMPTS,
            store=self._root / "store",
            max_new_tokens=MAX_NEW_TOKENS,
            eos_token_ids=eos,
            weight_codec=weight_codec,
            kv_codec=kv_codec,
        )


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(tmp_path_factory.mktemp("host-attention"))


def on_host(classes: Classes, cache: tuple[float, float] = (40.0, 60.0), *, num_gpu_batches: int = 3) -> Policy:
    """Two rows a GPU batch; weights and hidden states on the first two tiers."""
    first, second, disk = classes
    return policy(
        setups(classes),
        gpu_batch_size=2,
        num_gpu_batches=num_gpu_batches,
        weights={first: 30, second: 70},
        kv_cache={second: cache[0], disk: cache[1]},
        activations={first: 50, second: 50},
        attention="host",
    )


@pytest.mark.parametrize("num_gpu_batches", [1, 2, 3])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("machine", MACHINES)
def test_the_tokens_are_those_of_transformers(
    jobs: Jobs, machine: str, cache: tuple[float, float], num_gpu_batches: int
) -> None:
    classes = MACHINES[machine]
    result = jobs.run(classes, on_host(classes, cache, num_gpu_batches=num_gpu_batches))
    assert result.tokens == jobs.expected
    attended = {event.task.tile.gpu_batch for event in result.trace.events if event.task.lane == ATTENTION_LANE}
    assert attended == set(range(num_gpu_batches))


@pytest.mark.parametrize("machine", MACHINES)
def test_sequences_that_end_early_give_their_rows_to_others(jobs: Jobs, machine: str) -> None:
    """Some GPU batches get prompts while the host attends for others."""
    eos = max({token for ids in jobs.expected.values() for token in ids}, key=lambda t: _ends(jobs.expected, t))
    expected = reference_tokens(jobs.checkpoint, PROMPTS, max_new_tokens=MAX_NEW_TOKENS, eos_token_id=eos)
    assert len({len(ids) for ids in expected.values()}) >= 3
    classes = MACHINES[machine]
    assert jobs.run(classes, on_host(classes), eos=(eos,)).tokens == expected


def _ends(tokens: Tokens, token: int) -> tuple[int, int]:
    """At how many different places a token would end sequences; the lower id among equals."""
    return len({ids.index(token) for ids in tokens.values() if token in ids}), -token


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(
    ("weight_codec", "kv_codec"),
    [
        (NoneCodec(), GroupInt4Codec().for_cache()),
        (GroupInt4Codec(), NoneCodec()),
        (GroupInt8Codec(), GroupInt8Codec()),
    ],
    ids=lambda codec: codec.key,
)
def test_an_encoded_job_gives_the_tokens_of_attention_on_the_device(
    jobs: Jobs, machine: str, weight_codec: Codec, kv_codec: Codec
) -> None:
    classes = MACHINES[machine]
    chosen = on_host(classes)
    tokens = [
        jobs.run(classes, replace(chosen, attention=place), weight_codec=weight_codec, kv_codec=kv_codec).tokens
        for place in ("host", "device")
    ]
    assert tokens[0] == tokens[1]


def test_the_host_attends_while_the_device_computes_the_next_tile(jobs: Jobs, tmp_path: Path) -> None:
    """Attention of a tile and the next tile's inputs meet in the midst of their work: a schedule that ran one after the
    other would stand still.
    """
    tiles = [(layer, k) for layer in (1, 2) for k in range(3)]
    following = dict(pairwise(tiles))
    met = {(step, *tile): Barrier(2) for step in range(1, MAX_NEW_TOKENS) for tile in tiles[1:]}

    def meeting(run: RunTask) -> RunTask:
        def met_halfway(task: Task) -> None:
            place = task.tile.layer, task.tile.gpu_batch
            if isinstance(task.operation, Attend) and place in following:
                met[task.tile.step, *following[place]].wait(timeout=60)
            if isinstance(task.operation, AttentionInputs) and place != tiles[0]:
                met[task.tile.step, *place].wait(timeout=60)
            run(task)

        return met_halfway

    result = run_job(
        jobs.checkpoint,
        disk_setups(ISLAND_HOST_DISK, tmp_path / "disk"),
        on_host(ISLAND_HOST_DISK),
        PROMPTS[:6],
        store=tmp_path / "store",
        max_new_tokens=MAX_NEW_TOKENS,
        executor=with_run(DataflowExecutor, meeting),
    )
    assert result.tokens == {index: jobs.expected[index] for index in range(6)}
    attend, inputs = (_events(result, operation) for operation in (Attend, AttentionInputs))
    assert len(attend) == len(tiles) * (MAX_NEW_TOKENS - 1)
    for step, *tile in attend:
        if (after := following.get((tile[0], tile[1]))) is not None:
            one, other = attend[step, *tile], inputs[step, *after]
            assert one.start < other.end
            assert other.start < one.end


def _events(result: JobResult, operation: type[Operation]) -> dict[tuple[int, ...], TaskEvent]:
    """By step, layer and GPU batch."""
    events = [event for event in result.trace.events if isinstance(event.task.operation, operation)]
    return {(e.task.tile.step, e.task.tile.layer, e.task.tile.gpu_batch): e for e in events}


@pytest.mark.parametrize("cache", CACHES)
def test_pages_of_the_cache_never_come_to_the_device(jobs: Jobs, cache: tuple[float, float]) -> None:
    """FlexGen's policy for OPT-175B: cache and hidden states on the disk, attention on the host."""
    chosen = on_host(ISLAND_HOST_DISK, cache)
    result = jobs.run(ISLAND_HOST_DISK, replace(chosen, activations=chosen.kv_cache))
    assert result.tokens == jobs.expected
    copies = [event.task.operation for event in result.trace.events if isinstance(event.task.operation, Copy)]
    moves = [move for copy in copies for move in copy.moves if move.source.region.startswith("kv.")]
    assert {move.target.tier for move in moves} <= {"host", "disk"}
    assert {move.source.region.split(".")[1] for move in moves if move.source.tier == "island"} == {"prompt"}
    device = {a.what for a in allocations(result.layout) if a.tier == "island"}
    assert device.isdisjoint({"kv_cache", "kv slots", "kv tails", "decoded kv"})
