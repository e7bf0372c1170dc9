"""Whole jobs on the virtual clock: bounds that hold for any job, agreement with real runs, and what sampling costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexflow_engine.abc.hardware import Beside, HardwareProfile, ProductRates
from flexflow_engine.abc.policy import Policy, WorkloadShape
from flexflow_engine.abc.tier import Tier
from flexflow_engine.graph.lanes import lane_widths
from flexflow_engine.placement.layout import Layout
from flexflow_engine.planning.clock import VirtualDataflow, VirtualExecutor, VirtualSequential
from flexflow_engine.planning.expectation import first_prompts_predicted
from flexflow_engine.planning.layers import MORE_LAYERS
from flexflow_engine.planning.predict import Predictor
from flexflow_engine.planning.sampling import sample_steps
from flexflow_engine.planning.simulate import compose
from flexflow_plugins.codecs.none import NoneCodec
from flexflow_plugins.models.opt import OPTModel
from harness import policy, random_prompts, run_job, save_opt
from layouts import DEVICE_FAR_DISK, ISLAND_HOST_DISK, TIERS, disk_setups, lay_out, opt, policies, setups
from profiles import constant, link, processor, profile

SPREAD = ((20.0, 30.0, 50.0), (10.0, 40.0, 50.0), (50.0, 50.0, 0.0))
"""Percent of weights, KV cache and activations on the tiers, fastest first."""
PROMPTS = (9, 9, 7, 7, 5, 5, 3, 3)


def machine(**parts: Any) -> HardwareProfile:
    """Links that matter beside the compute lane."""
    return profile(
        links={"zarr": link(0.7e6, 0.002), "pinned": link(2e6, 0.001), "throttled": link(2e6, 0.001)},
        cpu=processor(task_s=0.003),
        **parts,
    )


def predictor(
    model: OPTModel,
    executor: type[VirtualExecutor] = VirtualDataflow,
    hardware: HardwareProfile | None = None,
    **limits: int,
) -> Predictor:
    none = NoneCodec()
    return Predictor(model=model, kv_codec=none, profile=hardware or machine(), executor=executor, **limits)


def spread(classes: Mapping[str, type[Tier]], *, num_gpu_batches: int = 2) -> Policy:
    """Every tensor class on several tiers."""
    weights, kv_cache, activations = (dict(zip(classes, shares, strict=True)) for shares in SPREAD)
    return policy(
        setups(classes),
        gpu_batch_size=2,
        num_gpu_batches=num_gpu_batches,
        weights=weights,
        kv_cache=kv_cache,
        activations=activations,
    )


def laid_out(
    model: OPTModel, classes: Mapping[str, type[Tier]], chosen: Policy, new: int = 6
) -> tuple[Layout, WorkloadShape]:
    return lay_out(model, classes, chosen, prompt_tokens=PROMPTS, max_new_tokens=new), WorkloadShape(
        PROMPTS, (new,) * len(PROMPTS)
    )


@given(classes=st.sampled_from(TIERS), data=st.data())
@settings(max_examples=15, deadline=None)
def test_a_job_takes_no_longer_than_its_tasks_one_by_one_and_no_less_than_its_busiest_lane(
    classes: Mapping[str, type[Tier]], data: st.DataObject
) -> None:
    layout, workload = laid_out(opt(), classes, data.draw(policies(classes)), new=3)
    together = predictor(opt()).predict(layout, workload)
    alone = predictor(opt(), VirtualSequential).predict(layout, workload)
    busiest = max(use.busy_s for use in together.lanes.values())
    assert busiest * (1 - 1e-9) <= together.seconds <= alone.seconds * (1 + 1e-9)
    assert together.relative_error == alone.relative_error == 0
    work = {lane: (use.nbytes, use.flops) for lane, use in together.lanes.items()}
    assert work == {lane: (use.nbytes, use.flops) for lane, use in alone.lanes.items()}


def test_one_by_one_a_job_takes_the_sum_of_its_tasks() -> None:
    layout, workload = laid_out(opt(), DEVICE_FAR_DISK, spread(DEVICE_FAR_DISK))
    events = predictor(opt(), VirtualSequential, max_tasks=10**6).first_events(layout, workload)
    seconds = predictor(opt(), VirtualSequential).predict(layout, workload).seconds
    assert events[-1].task.lane == "tokens", "a run ends with its last computation"
    assert seconds == pytest.approx(sum(event.end - event.start for event in events[:-1]))


def test_predictions_of_one_job_are_equal() -> None:
    layout, workload = laid_out(opt(), ISLAND_HOST_DISK, spread(ISLAND_HOST_DISK))
    first, again = (predictor(opt()).predict(layout, workload) for _ in range(2))
    assert first == again


def test_a_slower_link_or_neighbours_that_take_of_it_cost_time() -> None:
    layout, workload = laid_out(opt(), DEVICE_FAR_DISK, spread(DEVICE_FAR_DISK))
    shared = Beside(reverse=0.5, links=0.5, processors=0.5)
    alone, slow, beside = (
        predictor(opt(), hardware=profile(links={"zarr": disk})).predict(layout, workload).seconds
        for disk in (link(0.2e6), link(0.1e6), link(0.2e6, beside=shared))
    )
    assert alone < beside < slow


def test_the_hosts_time_to_compile_bounds_a_job_of_small_tasks() -> None:
    layout, workload = laid_out(opt(), DEVICE_FAR_DISK, spread(DEVICE_FAR_DISK))
    tasks = len(predictor(opt(), max_tasks=10**6).first_events(layout, workload))
    seconds = predictor(opt(), hardware=machine(compile_task_s=1.0)).predict(layout, workload).seconds
    assert seconds > tasks


@pytest.mark.parametrize("classes", [DEVICE_FAR_DISK, ISLAND_HOST_DISK], ids=["direct", "staged"])
def test_a_simulated_job_does_the_work_of_the_real_one(tmp_path: Path, classes: Mapping[str, type[Tier]]) -> None:
    prompts, completions = random_prompts(7, longest=20), random_prompts(7, longest=9, seed=1)
    real = run_job(
        save_opt(tmp_path / "opt"),
        disk_setups(classes, tmp_path / "disk"),
        spread(classes),
        prompts,
        store=tmp_path / "store",
        completions=completions,
    )
    lengths = WorkloadShape(tuple(map(len, prompts)), tuple(map(len, completions)))
    prediction = predictor(opt()).predict(real.layout, lengths)
    measured = real.trace.lanes(lane_widths(real.layout))
    assert {lane: (use.nbytes, use.flops) for lane, use in prediction.lanes.items()} == {
        lane: (use.nbytes, use.flops) for lane, use in measured.items()
    }
    events = predictor(opt(), max_tasks=10**6).first_events(real.layout, lengths)
    assert {event.task.key for event in events} == {event.task.key for event in real.trace.events}
    assert prediction.generated_tokens == sum(map(len, real.tokens.values()))


@pytest.mark.parametrize("executor", [VirtualDataflow, VirtualSequential])
def test_a_sample_of_steps_and_layers_comes_close_to_the_whole_job(executor: type[VirtualExecutor]) -> None:
    model = opt(num_hidden_layers=14)
    layout, workload = laid_out(model, DEVICE_FAR_DISK, spread(DEVICE_FAR_DISK), new=24)
    whole = predictor(model, executor, max_tasks=10**9).predict(layout, workload)
    sampled = predictor(model, executor, max_tasks=0).predict(layout, workload)
    assert whole.relative_error == 0
    assert sampled.prefill_s == pytest.approx(whole.prefill_s, rel=0.03)
    assert sampled.decode_s == pytest.approx(whole.decode_s, rel=0.03)
    assert 0 <= sampled.relative_error < 0.03
    assert sampled.bound_by == whole.bound_by
    for lane in ("compute", whole.bound_by):
        assert sampled.lanes[lane].busy_s == pytest.approx(whole.lanes[lane].busy_s, rel=0.03)


def test_a_job_of_many_lengths_is_sampled_too() -> None:
    chosen, generator = spread(DEVICE_FAR_DISK), np.random.default_rng(0)
    lengths = generator.integers(1, 40, size=(2, 60)).tolist()
    workload = WorkloadShape(*map(tuple, lengths))
    layout = lay_out(opt(), DEVICE_FAR_DISK, chosen, prompt_tokens=lengths[0], max_new_tokens=40)
    steps = compose(workload, chosen)
    assert sum(len(sample.chosen) for sample in sample_steps(steps, layout.kv.page_tokens)) < len(steps) / 4
    whole, sampled = (predictor(opt(), max_tasks=most).predict(layout, workload) for most in (10**9, 0))
    assert sampled.seconds == pytest.approx(whole.seconds, rel=0.03)
    assert sampled.generated_tokens == sum(lengths[1])


def test_a_sample_of_layers_multiplies_as_the_whole_model_does() -> None:
    """Its first layers have everything in memory, others have not: no product is shared by torch's threads."""
    model = opt(num_hidden_layers=14)
    mostly = policy(setups(DEVICE_FAR_DISK), gpu_batch_size=2, num_gpu_batches=2, weights={"device": 99, "disk": 1})
    layout, workload = laid_out(model, DEVICE_FAR_DISK, mostly, new=24)
    assert {run.tier for layer in layout.weights.layers[:MORE_LAYERS] for run in layer.runs} == {"device"}
    alone = machine()
    team = ProductRates(matmul_flops_per_s=constant(1e12), product_s=0.0)
    faster = replace(alone, processors={"cpu": replace(alone.processors["cpu"], torch_team={"float32": team})})
    with_team, without = (
        predictor(model, hardware=hardware, max_tasks=0).predict(layout, workload) for hardware in (faster, alone)
    )
    assert with_team == without


def test_steps_in_which_pages_fill_and_those_after_prompts_are_kinds_of_their_own() -> None:
    workload = WorkloadShape((8, 8), (9, 9))
    steps = compose(workload, spread(DEVICE_FAR_DISK, num_gpu_batches=1))
    samples = sample_steps(steps, page_tokens=4)
    assert [sorted(n for _, n in sample.steps) for sample in samples] == [[0], [1], [2, 3, 5, 6, 7], [4, 8]]
    assert [sorted(n for _, n in sample.chosen) for sample in samples] == [[0], [1], [2, 5, 7], [4, 8]]


def test_the_steps_of_a_job_are_predicted_as_the_job_is() -> None:
    layout, workload = laid_out(opt(), DEVICE_FAR_DISK, spread(DEVICE_FAR_DISK))
    steps = compose(workload, layout.policy)
    assert predictor(opt()).seconds(layout, steps) == pytest.approx(predictor(opt()).predict(layout, workload).seconds)
    assert predictor(opt(), max_tasks=10).seconds(layout, steps) is None


@pytest.mark.parametrize(("num_gpu_batches", "told"), [(2, True), (1000, False)])
def test_a_run_does_not_wait_for_what_its_first_step_would_take(num_gpu_batches: int, told: bool) -> None:
    layout, workload = laid_out(opt(), DEVICE_FAR_DISK, spread(DEVICE_FAR_DISK, num_gpu_batches=num_gpu_batches))
    first, *_ = compose(workload, layout.policy)
    text = first_prompts_predicted(first, layout, predictor(opt()), 60.0)
    assert ("tokens, about " in text) == told
    assert text.endswith("; the whole job about 1:00 (predicted)")
