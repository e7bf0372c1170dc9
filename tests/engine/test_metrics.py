"""Metrics of a run, from its steps' times and its lanes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexflow_engine.abc.prediction import LaneUse
from flexflow_engine.abc.step import BatchStep, Phase, RowStep, Step
from flexflow_engine.abc.tier import NoOptions
from flexflow_engine.products.matmul import HostProducts
from flexflow_engine.runtime.metrics import collect, phase_seconds
from flexflow_engine.runtime.session import StepTime
from flexflow_tiers.cpu import CpuTier
from flexflow_tiers.pinned import PinnedTier
from harness import policy
from layouts import DEVICE_HOST, lay_out, opt, setups

LANES = {"compute": LaneUse(2.0, 0, 5e9), "host.read": LaneUse(3.0, 700, 0.0), "host.write": LaneUse(0.0, 0, 0.0)}


def batch(gpu_batch: int, phase: Phase, *, rows: int = 1, tokens: int = 1) -> BatchStep:
    context = 0 if phase == "prefill" else 9
    return BatchStep(
        gpu_batch, tuple(RowStep(row=r, sequence=r, new_tokens=tokens, context=context) for r in range(rows))
    )


def times(*steps: tuple[float, Sequence[BatchStep]]) -> list[StepTime]:
    return [StepTime(Step(index, tuple(batches)), end) for index, (end, batches) in enumerate(steps)]


def metrics(steps: list[StepTime], **tokens: int) -> dict[str, Any]:
    chosen = policy(setups(DEVICE_HOST), weights={"device": 40, "host": 60}, kv_cache={"host": 100})
    tiers = {
        "device": CpuTier(label="device", budget_bytes=1000, options=NoOptions()),
        "host": PinnedTier(label="host", budget_bytes=2000, options=NoOptions()),
    }
    tiers["host"].reserve(700, what="test")
    counts = {"prompt_tokens": 30, "first_tokens": 2, "generated_tokens": 12} | tokens
    return collect(
        layout=lay_out(opt(), DEVICE_HOST, chosen),
        tiers=tiers,
        lanes=LANES,
        times=steps,
        predicted_tokens_per_s=None,
        float32_from=None,
        products=HostProducts,
        **counts,
    )


def test_each_phase_has_the_time_of_its_own_steps() -> None:
    steps = times((2.0, [batch(0, "prefill", tokens=9)]), (2.5, [batch(0, "decode")]), (3.0, [batch(0, "decode")]))
    assert phase_seconds(steps) == (2.0, 1.0)


def test_a_mixed_step_is_split_by_token_positions() -> None:
    mixed = [batch(0, "decode", rows=2), batch(1, "prefill", rows=2, tokens=3)]
    assert phase_seconds(times((4.0, mixed))) == (3.0, 1.0)


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=9))
def test_the_phases_add_up_to_the_whole_run(drawn: list[tuple[int, int, int]]) -> None:
    steps, end = [], 0.0
    for seconds, prompt_rows, token_rows in drawn:
        end += seconds
        batches = [batch(0, "prefill", rows=prompt_rows + 1, tokens=7)]
        steps.append((end, [*batches, batch(1, "decode", rows=token_rows)] if token_rows else batches))
    assert sum(phase_seconds(times(*steps))) == pytest.approx(end)


def test_no_step_takes_no_time() -> None:
    assert phase_seconds([]) == (0.0, 0.0)


def test_rates_are_tokens_over_the_time_of_their_phases() -> None:
    result = metrics(times((2.0, [batch(0, "prefill", rows=2, tokens=15)]), (4.0, [batch(0, "decode", rows=2)])))
    assert (result["prefill_s"], result["decode_s"]) == (2.0, 2.0)
    assert result["tokens_per_s"] == 12 / 4.0
    assert result["decode_tokens_per_s"] == (12 - 2) / 2.0


def test_a_job_without_decode_steps_has_no_decode_rate() -> None:
    result = metrics(times((2.0, [batch(0, "prefill")])), generated_tokens=2)
    assert result["decode_tokens_per_s"] is None
    assert result["tokens_per_s"] == 1.0


def test_the_busiest_lane_bounds_the_run() -> None:
    assert metrics(times((1.0, [batch(0, "prefill")])))["bound_by"] == "host.read"


def test_lanes_tell_flops_or_bytes_and_tiers_their_peak() -> None:
    result = metrics(times((1.0, [batch(0, "prefill")])))
    assert result["lanes"] == {
        "compute": {"busy_s": 2.0, "flops": 5e9},
        "host.read": {"busy_s": 3.0, "bytes": 700},
        "host.write": {"busy_s": 0.0, "bytes": 0},
    }
    assert result["tiers"] == {
        "device": {"budget_bytes": 1000, "peak_bytes": 0},
        "host": {"budget_bytes": 2000, "peak_bytes": 700},
    }


def test_metrics_are_ready_for_json_and_name_the_policy_as_fixed_takes_it() -> None:
    result = metrics(times((1.0, [batch(0, "prefill")])))
    assert json.loads(json.dumps(result)) == result
    assert result["policy"]["weights"] == {"device": 40, "host": 60}
    assert result["policy"]["kv_cache"] == {"host": 100}
    assert result["placement"]["kv_cache"]["device"] == 0
    assert set(result["placement"]) == set(result["page_bytes"]) == {"weights", "kv_cache", "activations"}
