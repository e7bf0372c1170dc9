"""What a run achieved, from its trace and its tiers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flexflow_engine.abc.prediction import LaneUse
from flexflow_engine.abc.tier import Tier
from flexflow_engine.placement.layout import Layout
from flexflow_engine.placement.memory import placed_bytes
from flexflow_engine.products.matmul import HostProducts, TeamProducts
from flexflow_engine.runtime.session import StepTime


def collect(
    *,
    layout: Layout,
    tiers: Mapping[str, Tier],
    lanes: Mapping[str, LaneUse],
    times: Sequence[StepTime],
    prompt_tokens: int,
    first_tokens: int,
    generated_tokens: int,
    predicted_tokens_per_s: float | None,
    float32_from: int | None,
    products: type[HostProducts],
) -> dict[str, Any]:
    """The metrics of a run, ready for JSON. first_tokens: how many generated tokens were sampled from prompts.
    predicted_tokens_per_s: None where nothing is known of the machine. float32_from, products: as the host multiplied,
    see `Session`.
    """
    prefill_s, decode_s = phase_seconds(times)
    total_s = prefill_s + decode_s
    return {
        "prompt_tokens": prompt_tokens,
        "generated_tokens": generated_tokens,
        "prefill_s": prefill_s,
        "decode_s": decode_s,
        "tokens_per_s": generated_tokens / total_s if total_s else 0.0,
        "decode_tokens_per_s": (generated_tokens - first_tokens) / decode_s if decode_s else None,
        "policy": layout.policy.as_fixed(),
        "placement": placed_bytes(layout),
        "page_bytes": _page_bytes(layout),
        "tiers": {n: {"budget_bytes": t.budget_bytes, "peak_bytes": t.peak_bytes} for n, t in tiers.items()},
        "lanes": {name: _lane(use) for name, use in lanes.items()},
        "bound_by": max(lanes, key=lambda name: lanes[name].busy_s),
        "predicted_tokens_per_s": predicted_tokens_per_s,
        "float32_from": float32_from,
        "torch_team": products is TeamProducts,
    }


def nothing_run() -> dict[str, Any]:
    """The metrics of a run that found every completion there: the same keys, no policy and no lane."""
    counts = dict.fromkeys(("prompt_tokens", "generated_tokens"), 0)
    times = dict.fromkeys(("prefill_s", "decode_s", "tokens_per_s"), 0.0)
    places: dict[str, Any] = {key: {} for key in ("placement", "page_bytes", "tiers", "lanes")}
    predictions = "predicted_tokens_per_s", "predicted_tokens_per_s_as_ended"
    unknown = ("decode_tokens_per_s", "policy", "bound_by", *predictions, "float32_from", "torch_team")
    return {**counts, **times, **places, **dict.fromkeys(unknown)}


def phase_seconds(times: Sequence[StepTime]) -> tuple[float, float]:
    """Seconds of prefill and of decode; a step that does both is split by its token positions."""
    prefill = decode = began = 0.0
    for time in times:
        seconds, began = time.end_s - began, time.end_s
        prompt_positions, positions = time.step.new_tokens("prefill"), sum(b.new_tokens for b in time.step.batches)
        prefill += seconds * prompt_positions / positions
        decode += seconds * (positions - prompt_positions) / positions
    return prefill, decode


def _lane(use: LaneUse) -> dict[str, float]:
    return {"busy_s": use.busy_s, "flops": use.flops} if use.flops else {"busy_s": use.busy_s, "bytes": use.nbytes}


def _page_bytes(layout: Layout) -> dict[str, int]:
    """The largest unit of placement of each tensor class."""
    pages = [page.nbytes for layer in layout.weights.layers for run in layer.runs for page in run.pages]
    return {
        "weights": max(pages),
        "kv_cache": layout.kv.page_nbytes,
        "activations": layout.activations.max_new_tokens * layout.activations.token_nbytes,
    }
