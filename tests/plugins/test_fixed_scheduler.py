"""The `fixed` scheduler turns the recipe's own numbers into a policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NoReturn

import pytest

from flexflow_engine.abc.model import ModelConfig
from flexflow_engine.abc.policy import (
    AttentionPlace,
    MemoryLine,
    MemoryTable,
    Policy,
    TierDescription,
    WorkloadShape,
)
from flexflow_engine.abc.scheduler import PlanRequest
from flexflow_plugins.schedulers.fixed import FixedOptions, FixedScheduler

TIERS = ("device", "host", "disk")
OPTIONS = FixedOptions(
    gpu_batch_size=4,
    num_gpu_batches=2,
    weights={"disk": 50, "device": 20, "host": 30},
    kv_cache={"host": 100, "disk": 0},
    activations={"device": 33.3, "host": 33.3, "disk": 33.4},
)
CONFIG = ModelConfig(
    model_type="opt",
    num_layers=1,
    hidden_size=8,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    vocab_size=16,
    max_positions=16,
    attention_scale=1.0,
    eos_token_ids=(2,),
)


def request(largest_page: int = 64) -> PlanRequest:
    """Pages of more than `largest_page` tokens do not fit."""

    def memory_table(policy: Policy) -> MemoryTable:
        return MemoryTable((MemoryLine("device", "tails", policy.kv_page_tokens),), {"device": largest_page})

    tiers = tuple(
        TierDescription(
            name=name,
            plugin="cpu",
            budget_bytes=1,
            memory="cpu",
            direct=True,
            reads_store=False,
            read_concurrency=1,
            write_concurrency=1,
        )
        for name in TIERS
    )
    return PlanRequest(
        config=CONFIG,
        dtype="float32",
        workload=WorkloadShape((5, 7), (4, 4)),
        tiers=tiers,
        attention_places=("device",),
        memory_table=memory_table,
        hardware=not_asked,
        step_costs=not_asked,
        predict=not_asked,
    )


def not_asked(*args: object) -> NoReturn:
    raise AssertionError("a fixed policy needs no hardware profile")


def test_the_policy_says_what_the_options_say_in_the_recipes_order_of_tiers() -> None:
    policy = FixedScheduler(OPTIONS).choose(request())
    assert (policy.gpu_batch_size, policy.num_gpu_batches, policy.attention) == (4, 2, "device")
    assert policy.weights.shares == (("device", 20.0), ("host", 30.0), ("disk", 50.0))
    assert policy.kv_cache.shares == (("device", 0.0), ("host", 100.0), ("disk", 0.0))


def test_a_policy_can_be_given_back_to_it() -> None:
    policy = FixedScheduler(OPTIONS).choose(request())
    again = FixedOptions(**policy.as_fixed())  # type: ignore[arg-type]  # as a recipe would
    assert FixedScheduler(again).choose(request()) == policy


@pytest.mark.parametrize(("largest", "chosen"), [(64, 16), (16, 16), (15, 8), (2, 2), (1, 1), (0, 1)])
def test_kv_pages_are_as_long_as_their_tails_leave_room(largest: int, chosen: int) -> None:
    assert FixedScheduler(OPTIONS).choose(request(largest)).kv_page_tokens == chosen


def test_a_given_page_length_is_taken_whether_it_fits_or_not() -> None:
    assert FixedScheduler(replace(OPTIONS, kv_page_tokens=64)).choose(request(1)).kv_page_tokens == 64


@pytest.mark.parametrize("asked", ["device", "host"])
def test_attention_runs_where_it_was_asked_for(asked: AttentionPlace) -> None:
    for memory in ("cpu", "cuda"):
        options = replace(OPTIONS, attention=asked)
        assert FixedScheduler(options).choose(with_memory(device=memory, host="cpu")).attention == asked


@pytest.mark.parametrize(
    ("memory", "kv_cache", "chosen"),
    [
        ({"device": "cuda", "host": "cpu"}, {"host": 100}, "host"),
        ({"device": "cuda", "host": "cpu"}, {"disk": 100}, "host"),
        ({"device": "cuda", "host": "cpu"}, {"device": 1, "host": 99}, "device"),
        ({"device": "cuda", "host": "cuda"}, {"host": 100}, "device"),
        ({"device": "cpu", "host": "cpu"}, {"host": 100}, "device"),
    ],
)
def test_auto_is_the_host_where_the_cache_lies_beyond_a_link(
    memory: Mapping[str, str], kv_cache: dict[str, float], chosen: str
) -> None:
    assert FixedScheduler(replace(OPTIONS, kv_cache=kv_cache)).choose(with_memory(**memory)).attention == chosen


def test_auto_is_the_device_where_the_only_host_memory_is_a_staging_tier() -> None:
    asked = with_memory(device="cuda", host="cpu")
    staged = replace(asked, tiers=tuple(replace(tier, placeable=tier.name != "host") for tier in asked.tiers))
    assert FixedScheduler(replace(OPTIONS, kv_cache={"disk": 100})).choose(staged).attention == "device"


def with_memory(**memory: str) -> PlanRequest:
    """Tiers in these memories, and in none that can be addressed where nothing is said."""
    tiers = tuple(replace(tier, memory=memory.get(tier.name)) for tier in request().tiers)
    return replace(request(), tiers=tiers)


def test_sound_options_have_no_problem() -> None:
    assert FixedScheduler(OPTIONS).problems(TIERS) == []


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (replace(OPTIONS, weights={"device": 99.9}), "the shares of `weights` add up to 99.9 and not to 100"),
        (replace(OPTIONS, weights={}), "the shares of `weights` add up to 0 and not to 100"),
        (replace(OPTIONS, kv_cache={"hots": 100}), "`hots`, which is no tier of the recipe; did you mean `host`?"),
        (replace(OPTIONS, activations={"host": 101, "disk": -1}), "`activations.disk` must be a percentage, not -1"),
        (
            replace(OPTIONS, attention="host", kv_cache={"device": 1, "host": 99}),
            "with `attention: host`, `kv_cache.device` must be 0",
        ),
        (replace(OPTIONS, gpu_batch_size=0), "`gpu_batch_size` must be more than 0, not 0"),
        (replace(OPTIONS, num_gpu_batches=-2), "`num_gpu_batches` must be more than 0, not -2"),
        (replace(OPTIONS, kv_page_tokens=0), "`kv_page_tokens` must be more than 0, not 0"),
    ],
)
def test_a_problem_is_told_once(options: FixedOptions, problem: str) -> None:
    (found,) = FixedScheduler(options).problems(TIERS)
    assert problem in found


def test_shares_may_miss_100_by_rounding() -> None:
    thirds = {"device": 100 / 3, "host": 100 / 3, "disk": 100 / 3}
    assert FixedScheduler(replace(OPTIONS, weights=thirds)).problems(TIERS) == []
