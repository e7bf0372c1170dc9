"""`run`: carry out a recipe, or show what it would put where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from flexflow_engine.cli.hardware import Hardware, hardware_for, lacking_at
from flexflow_engine.cli.outputs import check_distinct, check_writable, write_whole
from flexflow_engine.cli.progress import progress_on_stderr
from flexflow_engine.cli.report import plan_as_json, render_plan, render_run, render_store, store_as_json
from flexflow_engine.cli.session import Json, Overrides, RecipePath, inputs_of, load
from flexflow_engine.jobs.recipe import Recipe
from flexflow_engine.plugins import Registry


def run(
    recipe: RecipePath,
    *,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option(metavar="F.jsonl", help="Completions; default: <recipe name>.completions.jsonl.")
    ] = None,
    metrics: Annotated[Path | None, typer.Option(metavar="F.json", help="Write the run's numbers.")] = None,
    trace: Annotated[Path | None, typer.Option(metavar="F.json", help="Write Chrome trace events.")] = None,
    hardware: Hardware = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the policy's memory table and stop.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew where an earlier run was cut short.")] = False,
    as_json: Json = False,
) -> None:
    """Run a recipe's prompts through its model and write the completions."""
    asked, registry = load(recipe, overrides)
    if dry_run:
        _show_plan(asked, registry, hardware, as_json=as_json)
        return
    destination = output or Path(f"{asked.name}.completions.jsonl")
    check_distinct(
        {"--output": destination, "--metrics": metrics, "--trace": trace},
        {"RECIPE": recipe, "--hardware": hardware, **inputs_of(asked)},
    )
    found = _run(asked, registry, output=destination, metrics=metrics, trace=trace, hardware=hardware, fresh=fresh)
    print(json.dumps(found, indent=2) if as_json else f"{render_run(found)}\n\ncompletions: {destination}")


def _show_plan(recipe: Recipe, registry: Registry, hardware: Path | None, *, as_json: bool) -> None:
    """Print what lies where. Raises PolicyError afterwards when it does not fit."""
    from flexflow_engine.engine import plan_recipe  # noqa: PLC0415  # torch; --help must not import it

    with progress_on_stderr() as progress, lacking_at(hardware):
        planned = plan_recipe(recipe, registry, hardware_for(hardware, progress.notice))
    plan, store = planned.plan, planned.store
    if as_json:
        print(json.dumps({**plan_as_json(plan.policy, plan.memory), **store_as_json(store)}, indent=2), flush=True)
    else:
        print(f"{render_plan(plan.policy, plan.memory)}\n\n{render_store(store)}", flush=True)
    plan.require_fit()


def _run(
    recipe: Recipe,
    registry: Registry,
    *,
    output: Path,
    metrics: Path | None,
    trace: Path | None,
    hardware: Path | None,
    fresh: bool,
) -> dict[str, object]:
    from flexflow_engine.engine import run_recipe  # noqa: PLC0415  # torch; --help must not import it

    for file in (metrics, trace):
        if file is not None:
            check_writable(file)
    with progress_on_stderr() as progress, lacking_at(hardware):
        found = run_recipe(
            recipe,
            registry,
            output=output,
            trace=trace,
            progress=progress,
            hardware=hardware_for(hardware, progress.notice),
            fresh=fresh,
        )
    if metrics is not None:
        write_whole(metrics, json.dumps(found, indent=2) + "\n")
    return found
