"""Results as a Markdown table and as a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from throughput.configuration import Configuration
from throughput.results import Result, job_bounds, roofline_tokens_per_s
from throughput.roofline import Bound

HEADER = (
    "configuration",
    "caches",
    "baseline tokens/s",
    "batch",
    "ours tokens/s",
    "ratio",
    "roofline",
    "of roofline",
    "bound by",
)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def throughput_rows(configurations: Sequence[Configuration], results: Mapping[str, Result]) -> list[Sequence[str]]:
    """One row a configuration that has a result, in the given order."""
    return [_row(c, results[c.name]) for c in configurations if c.name in results]


def plot(configurations: Sequence[Configuration], results: Mapping[str, Result], path: Path) -> None:
    """Bars of both sides, and the roofline as a line over ours."""
    from matplotlib.figure import Figure  # noqa: PLC0415  # of the extra `bench`; the tables need none

    shown = [c for c in configurations if c.name in results]
    figure = Figure(figsize=(2 + 2.2 * len(shown), 4), layout="constrained")
    axes = figure.subplots()
    places = range(len(shown))
    baseline = [results[c.name].baseline_tokens_per_s for c in shown]
    ours = [results[c.name].engine_tokens_per_s for c in shown]
    axes.bar([x - 0.2 for x in places], baseline, 0.4, label="transformers + accelerate", color="#b0b7c3")
    axes.bar([x + 0.2 for x in places], ours, 0.4, label="flexflow_engine", color="#2563eb")
    rooflines = {x: _roofline(c, results[c.name]) for x, c in enumerate(shown) if results[c.name].engine}
    starts = list(rooflines)
    axes.hlines(list(rooflines.values()), starts, [x + 0.4 for x in starts], colors="#dc2626", label="roofline")
    axes.set_xticks(list(places), [c.name for c in shown])
    axes.set_ylabel("tokens/s")
    axes.legend()
    figure.savefig(path, dpi=150)


def _row(configuration: Configuration, result: Result) -> Sequence[str]:
    ours, baseline = result.engine_tokens_per_s, result.baseline_tokens_per_s
    ratio = f"{ours / baseline:.1f}" if ours and baseline else "-"
    batch = str(result.best_batch_size or "-")
    figures = (configuration.name, result.caches, _baseline(result), batch, _ours(result), ratio)
    if not result.engine:
        return (*figures, "-", "-", "-")
    roofline = _roofline(configuration, result)
    prefill, decode = job_bounds(configuration, result.engine[0])
    bounds = ", ".join(f"{p} {_resource(configuration, b)}" for p, b in (("prefill", prefill), ("decode", decode)))
    return (*figures, f"{roofline:.1f}", f"{_of_roofline(configuration, result):.2f}", bounds)


def _resource(configuration: Configuration, bound: Bound) -> str:
    return bound.slowest if bound.slowest == "compute" else f"{configuration.far} {bound.slowest}"


def _baseline(result: Result) -> str:
    if result.best_batch_size is not None:
        return f"{result.baseline_tokens_per_s:.2f}"
    return f"batch {result.baseline[0].batch_size} {result.baseline[0].note}" if result.baseline else "-"


def _ours(result: Result) -> str:
    if not result.engine:
        return result.engine_note or "-"
    speeds = [run.tokens_per_s for run in result.engine]
    spread = f" ({min(speeds):.1f} to {max(speeds):.1f})" if len(speeds) > 1 else ""
    return f"{result.engine_tokens_per_s:.2f}{spread}"


def _roofline(configuration: Configuration, result: Result) -> float:
    return median(roofline_tokens_per_s(configuration, run) for run in result.engine)


def _of_roofline(configuration: Configuration, result: Result) -> float:
    """Each run over its own roofline, and of these the median."""
    return median(run.tokens_per_s / roofline_tokens_per_s(configuration, run) for run in result.engine)
