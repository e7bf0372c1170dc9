"""The verbs, by name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import typer

from flexflow_engine.cli import doctor, import_, plan, plugins, profile, run, schema, store
from flexflow_engine.cli.allocator import return_freed_blocks
from flexflow_engine.cli.exits import with_exit_status
from flexflow_engine.hookspecs import NAME

PROGRAM = "flexflow-engine"
_OPENMP = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}
"""Threads sleep while they wait, GNU's after some tens of microseconds: docs/decisions/0008."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Carry out a command line (None: the process's own) and leave by SystemExit with its status."""
    for variable, value in _OPENMP.items():
        os.environ.setdefault(variable, value)  # before torch loads OpenMP
    return_freed_blocks()
    _build()(args=arguments, prog_name=PROGRAM)


def _tell_version(asked: bool) -> None:
    if asked:
        print(f"{PROGRAM} {version(NAME)}")
        raise typer.Exit


def _build() -> typer.Typer:
    app = _group("Language models larger than memory, at the speed of the slowest resource.")
    app.callback()(_of_the_program)
    for name, verb, about in (
        ("run", run.run, "Run a recipe's prompts and write the completions."),
        ("plan", plan.plan, "Predict a run, for this machine or another."),
        ("profile", profile.profile, "Measure this machine, for plans and predictions."),
        ("import", import_.import_, "Import a recipe's weights into the store."),
        ("doctor", doctor.doctor, "Tell what hinders runs here, and what would help."),
        ("plugins", plugins.plugins, "List what is installed, broken plugins too."),
        ("schema", schema.schema, "Print the JSON schema of recipes."),
    ):
        app.command(name, short_help=about)(with_exit_status(verb))
    stores = _group("The weight stores that imports have made.")
    stores.command("list")(with_exit_status(store.list_))
    stores.command("remove", short_help="Remove one weight store.")(with_exit_status(store.remove))
    app.add_typer(stores, name="store")
    return app


def _of_the_program(
    *,
    version: Annotated[  # its callback has ended the program
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Options before a verb."""


def _group(about: str) -> typer.Typer:
    return typer.Typer(
        help=about, add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False
    )
