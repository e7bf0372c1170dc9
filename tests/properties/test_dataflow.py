"""The dataflow executor computes what the sequential one computes, bit for bit, whatever the lanes' speed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexflow_engine.abc.dtypes import DType
from flexflow_engine.abc.policy import Policy
from flexflow_engine.abc.tier import Tier
from flexflow_engine.graph import transfers
from flexflow_engine.runtime.executor import DataflowExecutor, Executor, SequentialExecutor
from harness import random_prompts, run_job, save_opt
from layouts import DEVICE_FAR, DEVICE_FAR_DISK, DEVICE_HOST_DISK, ISLAND_HOST_DISK, disk_setups, policies
from watched import Regions, digests, random_delays, with_run

Classes = Mapping[str, type[Tier]]
Outcome = tuple[dict[int, tuple[int, ...]], dict[str, tuple[int, ...]]]
"""Tokens by sequence, and checksums of what every computation wrote."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two layers; the store grows beside it."""
    folder = tmp_path_factory.mktemp("dataflow")
    save_opt(folder / "checkpoint", num_hidden_layers=2, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64)
    return folder


class Job:
    """The same work, as often as wanted."""

    def __init__(self, folder: Path, data: st.DataObject, classes: Classes, dtype: DType) -> None:
        self._folder, self._dtype = folder, dtype
        self._tiers = disk_setups(classes, folder / "disk")
        self._policy: Policy = data.draw(policies(classes))
        self._prompts = random_prompts(data.draw(st.integers(1, 9)), seed=data.draw(st.integers(0, 99)), longest=12)
        self._eos = [data.draw(st.integers(0, 299))]
        self._max_new_tokens = data.draw(st.integers(1, 6))

    def run(self, executor: Callable[..., Executor], *, delays: int | None = None) -> Outcome:
        regions, recorded = Regions(), dict[str, tuple[int, ...]]()
        watched = with_run(executor, digests(regions, recorded))
        result = run_job(
            self._folder / "checkpoint",
            {name: regions.watch(setup) for name, setup in self._tiers.items()},
            self._policy,
            self._prompts,
            store=self._folder / "store",
            max_new_tokens=self._max_new_tokens,
            eos_token_ids=self._eos,
            dtype=self._dtype,
            executor=watched if delays is None else with_run(watched, random_delays(delays)),
        )
        assert not regions.left_at_close
        return result.tokens, recorded


@settings(max_examples=25)
@given(
    data=st.data(),
    classes=st.sampled_from([DEVICE_FAR, DEVICE_HOST_DISK, DEVICE_FAR_DISK, ISLAND_HOST_DISK]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    delays=st.integers(0, 2**32),
    task_nbytes=st.sampled_from([1, transfers.TASK_NBYTES]),
)
def test_dataflow_equals_sequential_bit_for_bit(  # noqa: PLR0917  # a job is three of them
    folder: Path, data: st.DataObject, classes: Classes, dtype: DType, delays: int, task_nbytes: int
) -> None:
    """task_nbytes: with little of it every page of the cache is loaded by a task of its own."""
    job = Job(folder, data, classes, dtype)
    tokens, states = job.run(SequentialExecutor)
    assert states
    with patch.object(transfers, "TASK_NBYTES", task_nbytes):
        delayed_tokens, delayed_states = job.run(DataflowExecutor, delays=delays)
    differing = [key for key, checksums in states.items() if delayed_states[key] != checksums]
    assert differing[:1] == []
    assert delayed_tokens == tokens
    assert delayed_states.keys() == states.keys()
