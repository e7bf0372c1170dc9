"""The benchmarks' arithmetic: rooflines, extrapolation, decode steps of a trace, budgets under a cap."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from flexflow_engine.engine import plan_recipe
from flexflow_engine.jobs.load import load_recipe
from flexflow_engine.plugins import Registry
from offload import CONFIGURATIONS, OPT_1_3B
from profiles import profile
from throughput.child import DidNotFinish, Done, Failed, run_capped
from throughput.configuration import MIB, RESERVE_NBYTES, Configuration
from throughput.extrapolation import SampledJob
from throughput.memory_cap import ROOT, memory_cap
from throughput.results import BaselineTry, EngineRun, Result, read_results, roofline_tokens_per_s, write_results
from throughput.roofline import PhaseWork, Rates, Shape, decode_bound, decode_work, prefill_bound, prefill_work
from throughput.steps import decode_window
from throughput.table import throughput_rows

SHAPE = Shape(layers=3, hidden=8, vocabulary=50)
RATES = Rates(far_read=10, far_write=5, prefill_matmul=400, decode_matmul=200, memory_read=100)
capped = pytest.mark.skipif(
    os.geteuid() != 0 or not any((ROOT / name).exists() for name in ("memory", "cgroup.controllers")),
    reason="a memory cap needs root and cgroups",
)


def layer_flops(tokens: int, contexts: int) -> int:
    """Two for each of 12 hidden² weights and token; scores and values, two each, for each position and number."""
    return SHAPE.layers * (2 * 12 * SHAPE.hidden**2 * tokens + 4 * SHAPE.hidden * contexts)


def test_prefill_work_is_that_of_every_token_with_those_before_it() -> None:
    work = prefill_work(SHAPE, sequences=5, prompt_tokens=7, far_read_nbytes=1, far_write_nbytes=2)
    contexts = sum(range(1, 8))
    assert work.flops == 5 * (layer_flops(7, contexts) + 2 * SHAPE.hidden * SHAPE.vocabulary)
    assert (work.cached_nbytes, work.far_read_nbytes, work.far_write_nbytes) == (0, 1, 2)


def test_decode_work_reads_the_cache_as_long_as_it_is_at_each_step() -> None:
    work = decode_work(
        SHAPE, sequences=5, prompt_tokens=7, new_tokens=4, cache_bits=16, far_read_nbytes=0, far_write_nbytes=0
    )
    assert work.flops == 5 * 3 * (layer_flops(1, 0) + 2 * SHAPE.hidden * SHAPE.vocabulary)
    assert work.cached_nbytes == 5 * (8 + 9 + 10) * 2 * SHAPE.layers * SHAPE.hidden * 2


@pytest.mark.parametrize(
    ("work", "slowest", "seconds"),
    [
        (PhaseWork(flops=400, cached_nbytes=100, far_read_nbytes=20, far_write_nbytes=10), "compute", 3.0),
        (PhaseWork(flops=400, cached_nbytes=100, far_read_nbytes=40, far_write_nbytes=10), "read", 4.0),
        (PhaseWork(flops=400, cached_nbytes=100, far_read_nbytes=40, far_write_nbytes=25), "write", 5.0),
    ],
)
def test_a_phase_takes_as_long_as_its_slowest_resource(work: PhaseWork, slowest: str, seconds: float) -> None:
    bound = decode_bound(work, RATES)
    assert (bound.slowest, bound.total_s) == (slowest, seconds)
    assert prefill_bound(work, RATES).seconds["compute"] == 2.0


def test_between_two_measurements_each_resource_takes_the_mean_of_both() -> None:
    work = PhaseWork(flops=400, cached_nbytes=100, far_read_nbytes=20, far_write_nbytes=10)
    later = replace(RATES, decode_matmul=50, memory_read=25, far_read=1)
    seconds = decode_bound(work, RATES.between(later)).seconds
    assert seconds["compute"] == pytest.approx((3.0 + 12.0) / 2)
    assert seconds["read"] == pytest.approx((2.0 + 20.0) / 2)
    assert seconds["write"] == pytest.approx(2.0)


def run_of(metrics: dict[str, Any]) -> EngineRun:
    return EngineRun(metrics=metrics, peak_bytes=1, rates=Rates(**dict.fromkeys(RATES.__dataclass_fields__, 1e9)))


def disk_run(tokens_per_s: float) -> EngineRun:
    """A run of OPT_1_3B that reads 10 TB, 1 TB of weights with the prompts: the bound of decode is 9000 s."""
    return run_of(
        {
            "tokens_per_s": tokens_per_s,
            "lanes": {"disk.read": {"bytes": 10e12}, "disk.write": {"bytes": 0}},
            "placement": {"weights": {"disk": 1e12}},
        }
    )


def test_the_roofline_adds_the_phases_bounds() -> None:
    """Prefill is bound by compute, at 1 Gflop/s: 256 x 32 tokens in the decoder layers, 256 in the head."""
    layers, head = 2 * 12 * 24 * 2048**2 * 32 + 4 * 24 * 2048 * 32 * 33 / 2, 2 * 2048 * 50272
    configuration = replace(OPT_1_3B, new_tokens=2)
    seconds = 256 * (layers + head) / 1e9 + 9000
    assert roofline_tokens_per_s(configuration, disk_run(1)) == pytest.approx(512 / seconds)


def test_a_job_is_extrapolated_from_its_first_and_last_steps() -> None:
    job = SampledJob(batch_size=8, new_tokens=11, prefill_s=5, first_steps_s=[9, 1, 1], last_steps_s=[3, 3, 7])
    assert job.step_s == 2
    assert job.tokens_per_s == pytest.approx(8 * 11 / (5 + 10 * 2))


def event(lane: str, step: int, start: float, end: float) -> dict[str, Any]:
    kind = "compute" if lane == "compute" else "load"
    return {"cat": kind, "tid": lane, "ts": start * 1e6, "dur": (end - start) * 1e6, "args": {"step": step}}


def test_decode_steps_are_measured_between_the_ends_of_steps() -> None:
    """
    second         0   1   2   3   4   5   6   7   8
    compute        |-0-|-1-----|       |-2-|   |-3-|      window: 3 to 8
    disk.read              |-2---------|-3-|              3 of its 4 seconds are in the window
    disk.read 2                    |-2-|   |-3-|          one second beside the other worker, one alone
    """
    events = [event("compute", *e) for e in ((0, 0, 1), (1, 1, 3), (2, 5, 6), (3, 7, 8))]
    events += [event("disk.read", 2, 2, 5), event("disk.read", 3, 5, 6)]
    events += [event("disk.read 2", 2, 4, 5), event("disk.read 2", 3, 6, 7)]
    window = decode_window(events, first_step=2)
    assert window.busy_s == pytest.approx({"compute": 2.0, "disk.read": 4.0})
    assert (window.seconds, window.busiest, window.ratio) == (5.0, "disk.read", 1.25)


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda c: c.name)
def test_each_policy_fits_budgets_that_add_up_to_the_cap_less_the_reserve(
    configuration: Configuration, tmp_path: Path
) -> None:
    recipe = configuration.recipe(tmp_path)
    recipe["model"]["checkpoint"] = f"synthetic:{configuration.model}"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    registry = Registry.load()
    plan = plan_recipe(load_recipe(tmp_path / "recipe.yaml", [], registry), registry, lambda needs: profile()).plan
    plan.require_fit()
    assert plan.memory.budgets["device"] == configuration.cap_nbytes - RESERVE_NBYTES
    assert plan.memory.peak_bytes("device") > 0.9 * plan.memory.budgets["device"], "memory left unused"


def test_results_come_back_from_their_file(tmp_path: Path) -> None:
    attempt = BaselineTry(batch_size=8, tokens_per_s=0, note="did not finish in 120 s", peak_bytes=3)
    results = {"a": Result(caches="cold", engine=(disk_run(2),), engine_note="", baseline=(attempt,))}
    write_results(tmp_path / "results.json", results)
    assert read_results(tmp_path / "results.json") == results


def test_the_table_takes_medians_and_the_baseline_s_best_batch_size() -> None:
    tries = [(8, 2.0), (16, 5.0), (32, 4.0), (16, 3.0), (16, 4.5)]
    baseline = tuple(BaselineTry(batch_size=n, tokens_per_s=t, note="", peak_bytes=1) for n, t in tries)
    result = Result(caches="cold", engine=tuple(map(disk_run, (8.0, 9.0, 30.0))), baseline=baseline)
    [row] = throughput_rows([OPT_1_3B], {OPT_1_3B.name: result})
    assert row[:6] == (OPT_1_3B.name, "cold", "4.50", "16", "9.00 (8.0 to 30.0)", "2.0")


def test_a_side_that_did_not_finish_is_shown_as_such() -> None:
    attempt = BaselineTry(batch_size=8, tokens_per_s=0, note="did not finish in 120 s", peak_bytes=1)
    result = Result(caches="cold", baseline=(attempt,), engine_note="was killed: out of memory")
    [row] = throughput_rows([OPT_1_3B], {OPT_1_3B.name: result})
    assert row[2:6] == ("batch 8 did not finish in 120 s", "-", "was killed: out of memory", "-")


@capped
def test_a_child_that_takes_more_than_its_cap_is_killed() -> None:
    hungry = ["-c", f"import json; print(json.dumps(dict(taken=len(bytearray({256 * MIB})))))"]
    assert isinstance(run_capped(hungry, memory_cap(64 * MIB), limit_s=60), Failed)
    outcome = run_capped(hungry, memory_cap(512 * MIB), limit_s=60)
    assert isinstance(outcome, Done)
    assert outcome.answer == {"taken": 256 * MIB}
    assert 256 * MIB < outcome.peak_bytes <= 512 * MIB


@capped
def test_a_child_is_ended_when_its_time_is_over() -> None:
    assert run_capped(["-c", "import time; time.sleep(60)"], memory_cap(64 * MIB), limit_s=1) == DidNotFinish(1)
