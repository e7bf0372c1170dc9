"""The verbs, by name."""

from __future__ import annotations

import os
from collections.abc import Sequence

import typer

from flexflow_engine.cli import doctor, import_, plan, plugins, profile, run, schema, store
from flexflow_engine.cli.allocator import return_freed_blocks
from flexflow_engine.cli.exits import with_exit_status

PROGRAM = "flexflow-engine"
_OPENMP = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}
"""Threads sleep while they wait, GNU's after some tens of microseconds: docs/decisions/0008."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Carry out a command line (None: the process's own) and leave by SystemExit with its status."""
    for variable, value in _OPENMP.items():
        os.environ.setdefault(variable, value)  # before torch loads OpenMP
    return_freed_blocks()
    _build()(args=arguments, prog_name=PROGRAM)


def _build() -> typer.Typer:
    app = _group("Language models larger than memory, at the speed of the slowest resource.")
    app.command("run")(with_exit_status(run.run))
    app.command("plan")(with_exit_status(plan.plan))
    app.command("profile")(with_exit_status(profile.profile))
    app.command("import")(with_exit_status(import_.import_))
    app.command("doctor")(with_exit_status(doctor.doctor))
    app.command("plugins")(with_exit_status(plugins.plugins))
    app.command("schema")(with_exit_status(schema.schema))
    stores = _group("The weight stores that imports have made.")
    stores.command("list")(with_exit_status(store.list_))
    stores.command("remove")(with_exit_status(store.remove))
    app.add_typer(stores, name="store")
    return app


def _group(about: str) -> typer.Typer:
    return typer.Typer(
        help=about, add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False
    )
