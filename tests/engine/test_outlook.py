"""What a larger budget would give: as much moves up as fits, or the rows double."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from flexflow_engine.abc.policy import Policy, WorkloadShape
from flexflow_engine.abc.prediction import StepShape
from flexflow_engine.planning.outlook import what_would_help
from flexflow_engine.planning.plan import Codecs, Planner, describe_tiers
from flexflow_plugins.codecs.none import NoneCodec
from flexflow_tiers.pinned import PinnedTier
from harness import MIB, policy
from layouts import DEVICE_FAR, opt, setups
from profiles import link, profile

PROMPT_TOKENS = 9


def planner(*, rows: int, budget_bytes: int = 64 * MIB, layers: int = 3) -> Planner:
    """One new token after the prompt's, over a link that nothing is as slow as."""
    codec = NoneCodec()
    return Planner(
        model=opt(num_hidden_layers=layers),
        codecs=Codecs(codec, codec, codec),
        workload=WorkloadShape((PROMPT_TOKENS,) * rows, (2,) * rows),
        tiers=describe_tiers(DEVICE_FAR, {"device": budget_bytes, "far": 64 * MIB}),
        hardware=lambda: profile(links={"throttled": link(1e3)}),
    )


def chosen(weights: Mapping[str, float], *, num_gpu_batches: int = 1) -> Policy:
    return policy(setups(DEVICE_FAR), gpu_batch_size=2, num_gpu_batches=num_gpu_batches, weights=weights)


def gain_of_the_budget(asked: Planner, before: Policy) -> float:
    """Of twice the device's budget; 0 where it is not told."""
    told = {one.change: one.gain for one in what_would_help(asked, before, {})}
    return next((gain for change, gain in told.items() if change.startswith("device: a budget of")), 0.0)


def seconds(asked: Planner, of: Policy) -> float:
    """In closed form, of a job whose rows are computed at once."""
    shape = StepShape(
        phase="prefill",
        gpu_batch_size=of.gpu_batch_size,
        num_gpu_batches=of.num_gpu_batches,
        context=PROMPT_TOKENS,
        attention=of.attention,
        kv_page_tokens=of.kv_page_tokens,
    )
    steps = (shape, replace(shape, phase="decode"))
    return sum(max(asked.step_costs().costs(step).seconds(of).values()) for step in steps)


def test_everything_that_fits_in_twice_the_budget_moves_up() -> None:
    asked, before = planner(rows=2), chosen({"device": 0, "far": 100})
    after = chosen({"device": 100, "far": 0})
    assert gain_of_the_budget(asked, before) == pytest.approx(seconds(asked, before) / seconds(asked, after) - 1)


def test_of_what_does_not_fit_whole_as_much_moves_up_as_fits() -> None:
    before, half = chosen({"device": 0, "far": 100}), chosen({"device": 50, "far": 50})
    budget_bytes = planner(rows=2, layers=16).memory(half).peak_bytes("device") // 2 + 1
    asked = planner(rows=2, budget_bytes=budget_bytes, layers=16)
    larger = planner(rows=2, budget_bytes=2 * budget_bytes, layers=16)
    moved = [chosen({"device": percent, "far": 100 - percent}) for percent in range(101)]
    fits = [one for one in moved if not larger.memory(one).exceeded]
    gains = [seconds(asked, before) / seconds(asked, one) - 1 for one in (fits[-3], fits[-1])]
    assert 0 < gains[0] <= gain_of_the_budget(asked, before) <= gains[1] * (1 + 1e-9)


def test_rows_double_where_weights_are_what_a_step_waits_for() -> None:
    before, twice = chosen({"far": 100}), chosen({"far": 100}, num_gpu_batches=2)
    least = planner(rows=4).memory(twice).peak_bytes("device")
    asked = planner(rows=4, budget_bytes=least // 2 + 1)
    rounds = 2 * seconds(asked, before)
    assert gain_of_the_budget(asked, before) == pytest.approx(rounds / seconds(asked, twice) - 1)
    assert gain_of_the_budget(replace(asked, workload=WorkloadShape((PROMPT_TOKENS,) * 2, (2, 2))), before) == 0.0


def test_no_larger_budget_is_advised_for_the_last_tier_of_the_recipe() -> None:
    far = {"far": 100.0}
    before = policy(setups(DEVICE_FAR), gpu_batch_size=2, num_gpu_batches=1, weights=far, kv_cache=far)
    needed = planner(rows=4).memory(replace(before, num_gpu_batches=2)).peak_bytes("far")
    (staging,) = describe_tiers({"staging": PinnedTier}, {"staging": 64 * MIB})
    of_the_recipe = describe_tiers(DEVICE_FAR, {"device": 64 * MIB, "far": needed - 1})
    for tiers in (of_the_recipe, (*of_the_recipe, replace(staging, placeable=False))):
        told = what_would_help(replace(planner(rows=4), tiers=tiers), before, {})
        assert not [one.change for one in told if one.change.startswith("far: a budget of")]
