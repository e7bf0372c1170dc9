"""A run's metrics and a policy's memory table, for people."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from flexflow_engine.abc.durations import format_duration
from flexflow_engine.abc.policy import TENSOR_CLASSES, MemoryTable, Policy
from flexflow_engine.abc.sizes import format_size
from flexflow_engine.cli.columns import columns

if TYPE_CHECKING:
    from flexflow_engine.checkpoint.room import StoreRoom


def render_run(metrics: Mapping[str, Any]) -> str:
    """Throughput, what lay on each tier, and which lane was the busiest. `metrics` are those of `--metrics`."""
    if metrics["policy"] is None:
        return "\n".join(_answers(metrics))
    return "\n\n".join(["\n".join(_summary(metrics)), _tiers(metrics), _lanes(metrics)])


def render_plan(policy: Policy, memory: MemoryTable) -> str:
    """What the policy puts on each tier, against the budgets."""
    totals = [_total(memory, tier, budget) for tier, budget in memory.budgets.items()]
    return "\n\n".join([render_policy(policy), render_lines(memory), _totals(totals)])


def render_policy(policy: Policy) -> str:
    """Its keys, as `fixed` takes them."""
    return columns(("policy", ""), [(key, json.dumps(value)) for key, value in policy.as_fixed().items()])


def render_lines(memory: MemoryTable) -> str:
    """What lies on each tier, without the sums."""
    return columns(
        ("tier", "what", "size"), [(line.tier, line.what, format_size(line.nbytes)) for line in memory.lines]
    )


def plan_as_json(policy: Policy, memory: MemoryTable) -> dict[str, object]:
    """The same for programs: the policy as `fixed` takes it, and each tier's lines."""
    return {"policy": policy.as_fixed(), "memory": {tier: _tier_as_json(memory, tier) for tier in memory.budgets}}


def render_store(room: StoreRoom) -> str:
    """How much of a disk the weight store takes."""
    store = f"weight store: {format_size(room.nbytes)} under {room.root}"
    if room.imported:
        return f"{store}, imported"
    return f"{store}, imported once; a budget counts no more of it than is placed on its tier"


def store_as_json(room: StoreRoom) -> dict[str, object]:
    """The same for programs."""
    return {"weight_store": {"under": str(room.root), "nbytes": room.nbytes, "imported": room.imported}}


def _summary(metrics: Mapping[str, Any]) -> Iterator[str]:
    seconds = metrics["prefill_s"] + metrics["decode_s"]
    phases = f"prefill {format_duration(metrics['prefill_s'])}, decode {format_duration(metrics['decode_s'])}"
    tokens = f"{metrics['prompt_tokens']} prompt and {metrics['generated_tokens']} generated tokens"
    yield f"{tokens} in {format_duration(seconds)} ({phases})"
    yield "throughput: " + ", ".join(_throughput(metrics))
    yield f"bound by: {_bound(metrics, seconds)}"
    yield from _answers(metrics)


def _answers(metrics: Mapping[str, Any]) -> Iterator[str]:
    if earlier := metrics.get("earlier_completions"):
        yield f"completions: {earlier} of {metrics['completions']} come from earlier runs of the job"
    if match := metrics.get("exact_match"):
        percent = 100 * match["matched"] / match["total"]
        yield f"exact match: {match['matched']} of {match['total']} ({percent:.1f} %)"
    if scored := metrics.get("scored_tokens"):
        perplexity = "no finite number" if metrics["perplexity"] is None else f"{metrics['perplexity']:.4f}"
        yield f"perplexity: {perplexity} over {scored} tokens"


def _throughput(metrics: Mapping[str, Any]) -> Iterator[str]:
    yield f"{metrics['tokens_per_s']:.1f} tokens/s"
    if metrics.get("decode_tokens_per_s") is not None:
        yield f"{metrics['decode_tokens_per_s']:.1f} while decoding"
    before, as_ended = metrics.get("predicted_tokens_per_s"), metrics.get("predicted_tokens_per_s_as_ended")
    if before is not None:
        yield f"{before:.1f} predicted" if before == as_ended else f"{before:.1f} predicted if no sequence ends early"
    if as_ended is not None and as_ended != before:
        yield f"{as_ended:.1f} predicted for the ends that were met"


def _bound(metrics: Mapping[str, Any], seconds: float) -> str:
    lane = metrics["bound_by"]
    busy = metrics["lanes"][lane]["busy_s"]
    return f"{lane} (busy {100 * busy / seconds:.0f} % of the time)" if seconds else str(lane)


def _tiers(metrics: Mapping[str, Any]) -> str:
    rows = [
        [tier, *(format_size(metrics["placement"].get(name, {}).get(tier, 0)) for name in TENSOR_CLASSES), *_use(sizes)]
        for tier, sizes in metrics["tiers"].items()
    ]
    return columns(("tier", *TENSOR_CLASSES, "peak", "budget"), rows)


def _use(sizes: Mapping[str, int]) -> tuple[str, str]:
    return format_size(sizes["peak_bytes"]), format_size(sizes["budget_bytes"])


def _lanes(metrics: Mapping[str, Any]) -> str:
    rows = [(lane, format_duration(use["busy_s"]), *_work(use)) for lane, use in metrics["lanes"].items()]
    return columns(("lane", "busy", "work", "rate"), rows)


def _work(use: Mapping[str, float]) -> tuple[str, str]:
    busy = use["busy_s"]
    if "flops" in use:
        rate = use["flops"] / busy if busy else 0.0
        return f"{use['flops'] / 1e9:.1f} Gflop", f"{rate / 1e9:.1f} Gflop/s"
    rate = use.get("bytes", 0) / busy if busy else 0.0
    return format_size(use.get("bytes", 0)), f"{format_size(rate)}/s"


def _total(memory: MemoryTable, tier: str, budget: int) -> tuple[str, str, str, str]:
    peak = memory.peak_bytes(tier)
    return tier, format_size(peak), format_size(budget), "too small" if peak > budget else ""


def _totals(totals: list[tuple[str, str, str, str]]) -> str:
    return columns(("tier", "peak", "budget", ""), totals)


def _tier_as_json(memory: MemoryTable, tier: str) -> dict[str, object]:
    lines = [{"what": line.what, "nbytes": line.nbytes} for line in memory.lines if line.tier == tier]
    return {"budget_bytes": memory.budgets[tier], "peak_bytes": memory.peak_bytes(tier), "lines": lines}
