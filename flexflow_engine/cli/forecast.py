"""A plan with its prediction: for people, and for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from flexflow_engine.abc.durations import format_duration
from flexflow_engine.abc.policy import TENSOR_CLASSES, MemoryTable, Placement
from flexflow_engine.abc.prediction import LaneUse, Prediction
from flexflow_engine.abc.scheduler import Candidate
from flexflow_engine.abc.sizes import format_size
from flexflow_engine.cli.columns import columns
from flexflow_engine.cli.report import plan_as_json, render_lines, render_policy, render_store, store_as_json

if TYPE_CHECKING:
    from flexflow_engine.engine import Forecast

BAR_WIDTH = 30


def render_forecast(forecast: Forecast) -> str:
    """The predicted times first; then bars of what is busy and what is full, other choices, the policy in full."""
    plan = forecast.plan
    parts = [
        "\n".join(_summary(forecast)),
        _lane_bars(forecast.prediction),
        _memory_bars(plan.memory),
        render_store(forecast.store),
        *_runners_up(forecast),
        *_improvements(forecast),
        render_policy(plan.policy),
        render_lines(plan.memory),
        f"to run this very policy:\n  --set scheduler='{_as_yaml(forecast)}'",
    ]
    return "\n\n".join(parts)


def forecast_as_json(forecast: Forecast) -> dict[str, object]:
    """What `plan --json` prints: keys as in `--metrics`, the memory table as in `--dry-run`, and whether it fits."""
    plan, prediction = forecast.plan, forecast.prediction
    tiers = {
        tier: {"budget_bytes": budget, "peak_bytes": plan.memory.peak_bytes(tier)}
        for tier, budget in plan.memory.budgets.items()
    }
    return {
        "predicted_tokens_per_s": prediction.tokens_per_s,
        "predicted_decode_tokens_per_s": prediction.decode_tokens_per_s,
        "prefill_s": prediction.prefill_s,
        "decode_s": prediction.decode_s,
        "prompt_tokens": prediction.prompt_tokens,
        "generated_tokens": prediction.generated_tokens,
        "sampling_error": prediction.relative_error,
        "hardware": forecast.hardware.name,
        "tiers": tiers,
        "lanes": {name: _lane(use, prediction) for name, use in prediction.lanes.items()},
        "bound_by": prediction.bound_by,
        "fits": not plan.memory.exceeded,
        "machine_lacks_bytes": _lacking(forecast),
        "exceeded_bytes": {tier: _excess(plan.memory, tier) for tier in plan.memory.exceeded},
        "runners_up": [
            {
                "predicted_tokens_per_s": candidate.prediction.tokens_per_s,
                "loses": _loss(forecast, candidate),
                "policy": candidate.policy.as_fixed(),
            }
            for candidate in forecast.candidates[1:]
        ],
        "what_would_help": [
            {
                "change": better.change,
                "gain": better.gain,
                "predicted_tokens_per_s": prediction.tokens_per_s * (1 + better.gain),
            }
            for better in forecast.improvements
        ],
        **plan_as_json(plan.policy, plan.memory),
        **store_as_json(forecast.store),
    }


def _lane(use: LaneUse, prediction: Prediction) -> dict[str, float]:
    work: dict[str, float] = {"flops": use.flops} if use.flops else {"bytes": use.nbytes}
    return {"busy_s": use.busy_s, "busy_share": use.busy_s / prediction.seconds, **work}


def _excess(memory: MemoryTable, tier: str) -> int:
    return memory.peak_bytes(tier) - memory.budgets[tier]


def _memory_bars(memory: MemoryTable) -> str:
    rows = []
    for tier, budget in memory.budgets.items():
        peak = memory.peak_bytes(tier)
        over = f"too small by {format_size(peak - budget)}" if peak > budget else ""
        share = f"{100 * peak / budget:.0f} %"
        rows.append((tier, _bar(peak / budget), share, format_size(peak), format_size(budget), over))
    return columns(("tier", "memory", "", "peak", "budget", ""), rows)


def _lane_bars(prediction: Prediction) -> str:
    rows = []
    for lane, use in prediction.lanes.items():
        share = use.busy_s / prediction.seconds
        rows.append((lane, _bar(share), f"{100 * share:.0f} %", format_duration(use.busy_s)))
    return columns(("lane", "busy", "", "time"), rows)


def _bar(share: float) -> str:
    filled = min(BAR_WIDTH, round(share * BAR_WIDTH))
    return f"[{'#' * filled}{' ' * (BAR_WIDTH - filled)}]"


def _summary(forecast: Forecast) -> Iterator[str]:
    prediction = forecast.prediction
    phases = f"prefill {format_duration(prediction.prefill_s)}, decode {format_duration(prediction.decode_s)}"
    tokens = f"{prediction.prompt_tokens} prompt and {prediction.generated_tokens} generated tokens"
    yield f"predicted for {forecast.hardware.name}: {tokens} in {format_duration(prediction.seconds)} ({phases})"
    rates = [f"{prediction.tokens_per_s:.2f} tokens/s"]
    if prediction.decode_tokens_per_s is not None:
        rates.append(f"{prediction.decode_tokens_per_s:.2f} while decoding")
    if round(100 * prediction.relative_error, 1):
        rates.append(f"sampling error up to {100 * prediction.relative_error:.1f} %")
    yield f"throughput: {', '.join(rates)}"
    share = prediction.lanes[prediction.bound_by].busy_s / prediction.seconds
    yield f"bound by: {prediction.bound_by} (busy {100 * share:.0f} % of the time)"
    for plugin, nbytes in _lacking(forecast).items():
        yield f"the budgets of {plugin} tiers are {format_size(nbytes)} more than {forecast.hardware.name} has"
    yield "it fits" if not forecast.plan.memory.exceeded else f"it does not fit: {', '.join(_excesses(forecast))}"


def _lacking(forecast: Forecast) -> dict[str, int]:
    budgets = forecast.plan.memory.budgets
    return forecast.hardware.lacking_bytes((tier.plugin, budgets[tier.name]) for tier in forecast.plan.layout.tiers)


def _loss(forecast: Forecast, candidate: Candidate) -> float:
    """By which fraction of its tokens a second a runner-up is slower than the choice; below 0 where it is faster by
    less than the scheduler goes by.
    """
    return 1 - candidate.prediction.tokens_per_s / forecast.candidates[0].prediction.tokens_per_s


def _runners_up(forecast: Forecast) -> Iterator[str]:
    rows = []
    for candidate in forecast.candidates[1:]:
        policy = candidate.policy
        placed = (_placement(policy.placement(tensor_class)) for tensor_class in TENSOR_CLASSES)
        batches = f"{policy.gpu_batch_size} x {policy.num_gpu_batches}"
        rate = f"{candidate.prediction.tokens_per_s:.2f}"
        rows.append((batches, *placed, policy.attention, rate, f"{-100 * _loss(forecast, candidate):+.1f} %"))
    if rows:
        yield columns(("runner-up", *TENSOR_CLASSES, "attention", "tokens/s", "beside the choice"), rows)


def _placement(placement: Placement) -> str:
    return ", ".join(f"{tier} {share:g}" for tier, share in placement.as_dict().items())


def _improvements(forecast: Forecast) -> Iterator[str]:
    rows = [
        (
            better.change,
            f"+{100 * better.gain:.1f} %",
            f"{forecast.prediction.tokens_per_s * (1 + better.gain):.2f}",
        )
        for better in forecast.improvements
    ]
    if rows:
        yield columns(("what would help", "gain, about", "tokens/s"), rows)


def _excesses(forecast: Forecast) -> Iterator[str]:
    memory = forecast.plan.memory
    for tier in memory.exceeded:
        yield f"{tier} lacks {format_size(_excess(memory, tier))}"


def _as_yaml(forecast: Forecast) -> str:
    """JSON is YAML, and quotes nothing that a shell would mind within single quotes."""
    return json.dumps({"plugin": "fixed", **forecast.plan.policy.as_fixed()})
