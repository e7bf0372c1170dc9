"""On a tier whose copies run late, as a GPU's do, the dataflow executor computes what the sequential one computes.

Where *issued* is taken for *done*, a late copy brings old bytes: into the rows that the host gathers in one staging
buffer for all GPU batches, or out of a cache page that the step before has still to store. The tier beside it is late
too, as a second GPU's is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from flexflow_engine.abc.policy import AttentionPlace, Policy
from flexflow_engine.abc.tier import NoOptions, Tier
from flexflow_engine.runtime.executor import DataflowExecutor, Executor, SequentialExecutor
from flexflow_engine.testing.async_tier import StreamIslandTier, StreamOptions
from flexflow_engine.testing.tiers import IslandTier
from flexflow_tiers.pinned import PinnedTier
from flexflow_tiers.zarr import ZarrTier
from harness import TierSetup, policy, random_prompts, run_job, save_opt
from layouts import disk_setups, setups, shares
from watched import Regions, digests, no_thread_left, with_run

Outcome = tuple[dict[int, tuple[int, ...]], dict[str, tuple[int, ...]]]
"""Tokens by sequence, and checksums of what every computation wrote."""

FAR: Mapping[str, type[Tier]] = {"host": PinnedTier, "disk": ZarrTier}
DEVICES = ("island", "second")
"""Tiers with a memory of their own, whose copies run late in the run that is compared."""
CLASSES: Mapping[str, type[Tier]] = {**dict.fromkeys(DEVICES, IslandTier), **FAR}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one decoder layer: a step's last stores are close to the next one's first loads."""
    folder = tmp_path_factory.mktemp("asynchronous")
    save_opt(folder / "checkpoint", num_hidden_layers=1, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64)
    return folder


def _far_shares(*often: dict[str, float]) -> st.SearchStrategy[dict[str, float]]:
    return st.one_of(st.sampled_from(often), shares(list(CLASSES)))


def _many_stores() -> Policy:
    """Every token fills a page of each row, and each page is a store of its own: they outlast the step's tokens, and
    the next step's loads of the cache are issued behind rows that wait for those tokens.
    """
    return policy(
        setups(CLASSES),
        gpu_batch_size=6,
        num_gpu_batches=1,
        weights={"island": 90.0, "host": 10.0},
        kv_cache={"host": 100.0},
        kv_page_tokens=1,
    )


@st.composite
def far_policies(draw: st.DrawFn) -> Policy:
    """Any placement, most often one with the table's rows on the host and full cache pages on far tiers; attention on
    the host where it can read the cache.
    """
    kv_cache = draw(_far_shares({"host": 100.0}, {"host": 50.0, "disk": 50.0}))
    places: list[AttentionPlace] = ["device"] if kv_cache.get("island") else ["device", "host"]
    return policy(
        setups(CLASSES),
        gpu_batch_size=draw(st.integers(1, 4)),
        num_gpu_batches=draw(st.integers(1, 4)),
        weights=draw(
            _far_shares(
                {"host": 100.0}, {"second": 100.0}, {"island": 50.0, "host": 50.0}, {"host": 60.0, "disk": 40.0}
            )
        ),
        kv_cache=kv_cache,
        activations=draw(_far_shares({"island": 100.0}, {"host": 100.0})),
        attention=draw(st.sampled_from(places)),
        kv_page_tokens=draw(st.integers(1, 5)),
    )


class Job:
    """The same work, as often as wanted."""

    def __init__(self, folder: Path, data: st.DataObject) -> None:
        self._folder = folder
        self._policy = data.draw(st.one_of(st.just(_many_stores()), far_policies()))
        rows = self._policy.gpu_batch_size * self._policy.num_gpu_batches
        count = data.draw(st.integers(rows, rows + 6))  # all GPU batches are filled, and rows refilled
        self._prompts = random_prompts(count, seed=data.draw(st.integers(0, 99)), longest=12)
        self._eos = [data.draw(st.integers(0, 299))]
        self._max_new_tokens = data.draw(st.integers(1, 5))

    def run(self, executor: Callable[..., Executor], device: TierSetup) -> Outcome:
        regions, recorded = Regions(), dict[str, tuple[int, ...]]()
        tiers = {**dict.fromkeys(DEVICES, device), **disk_setups(FAR, self._folder / "disk")}
        result = run_job(
            self._folder / "checkpoint",
            {name: regions.watch(setup) for name, setup in tiers.items()},
            self._policy,
            self._prompts,
            store=self._folder / "store",
            max_new_tokens=self._max_new_tokens,
            eos_token_ids=self._eos,
            executor=with_run(executor, digests(regions, recorded)),
        )
        assert not regions.left_at_close
        return result.tokens, recorded


@settings(max_examples=20, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # races shrink badly, and for minutes
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_late_copies_change_nothing(folder: Path, data: st.DataObject, seed: int) -> None:
    job = Job(folder, data)
    tokens, states = job.run(SequentialExecutor, TierSetup(IslandTier, options=NoOptions()))
    assert states
    with no_thread_left():
        late_tokens, late_states = job.run(DataflowExecutor, TierSetup(StreamIslandTier, options=StreamOptions(seed)))
    assert [key for key, checksums in states.items() if late_states[key] != checksums][:1] == []
    assert late_tokens == tokens
    assert late_states.keys() == states.keys()
