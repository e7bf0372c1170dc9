"""What most verbs begin with: the installed plugins, and the recipe as the command line changes it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from flexflow_engine.errors import RecipeError
from flexflow_engine.jobs.load import load_recipe
from flexflow_engine.jobs.recipe import Recipe
from flexflow_engine.plugins import BLOCK_VARIABLE, Registry, unknown_blocked

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file; `schema` prints what may stand in it.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Change the recipe: tiers.gpu.budget=8GiB. May be repeated."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]


def load_registry() -> Registry:
    """The installed plugins but those that the environment blocks; names that block none are told on stderr."""
    blocked = [name.strip() for name in os.environ.get(BLOCK_VARIABLE, "").split(",") if name.strip()]
    for line in unknown_blocked(blocked):
        print(line, file=sys.stderr)
    return Registry.load(blocked=blocked)


def inputs_of(recipe: Recipe) -> dict[str, Path]:
    """The files that a job reads, by what they are for: its prompts, and what lies in a local checkpoint."""
    prompts, files = recipe.workload.prompts, dict[str, Path]()
    with suppress(OSError):  # no folder of this machine, or one that can't be read, which is told when it is opened
        files = {f"the checkpoint's {file.name}": file for file in Path(recipe.model.checkpoint).iterdir()}
    return files | ({"prompts": prompts} if isinstance(prompts, Path) else {})


def load_if_given(path: Path | None, overrides: Sequence[str] | None) -> tuple[Recipe | None, Registry]:
    """Raises RecipeError where `overrides` have no recipe to change."""
    if path is not None:
        return load(path, overrides)
    if overrides:
        raise RecipeError("there is no recipe to change", where=f"--set {overrides[0]}", fix="name a RECIPE")
    return None, load_registry()


def load(path: Path, overrides: Sequence[str] | None) -> tuple[Recipe, Registry]:
    registry = load_registry()
    return load_recipe(path, overrides or (), registry), registry
