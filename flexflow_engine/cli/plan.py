"""`plan`: what a run would put where and how long it would take, on this machine or another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flexflow_engine.cli.forecast import forecast_as_json, render_forecast
from flexflow_engine.cli.hardware import Hardware, hardware_for, lacking_at
from flexflow_engine.cli.outputs import check_distinct, check_writable
from flexflow_engine.cli.progress import progress_on_stderr
from flexflow_engine.cli.session import Json, Overrides, RecipePath, inputs_of, load

if TYPE_CHECKING:
    from flexflow_engine.planning.clock import VirtualExecutor


def plan(
    recipe: RecipePath,
    *,
    overrides: Overrides = None,
    hardware: Hardware = None,
    no_overlap: Annotated[
        bool, typer.Option("--no-overlap", help="Predict one task after another, to see what overlap is worth.")
    ] = False,
    trace: Annotated[
        Path | None, typer.Option(metavar="F.json", help="Write Chrome trace events of the job's first steps.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Predict a recipe's throughput without running it; reads no weights, and with --hardware needs no GPU."""
    from flexflow_engine.engine import predict_recipe  # noqa: PLC0415  # torch; --help must not import it

    asked, registry = load(recipe, overrides)
    check_distinct({"--trace": trace}, {"RECIPE": recipe, "--hardware": hardware, **inputs_of(asked)})
    if trace is not None:
        check_writable(trace)
    with progress_on_stderr() as progress, lacking_at(hardware):
        forecast = predict_recipe(
            asked,
            registry,
            hardware=hardware_for(hardware, progress.notice),
            executor=_executor(no_overlap=no_overlap),
            trace=trace,
        )
    print(json.dumps(forecast_as_json(forecast), indent=2) if as_json else render_forecast(forecast))


def _executor(*, no_overlap: bool) -> type[VirtualExecutor]:
    from flexflow_engine.planning.clock import VirtualDataflow, VirtualSequential  # noqa: PLC0415

    return VirtualSequential if no_overlap else VirtualDataflow
