"""`import`: put a recipe's weights into the store, which `run` would do first."""

from __future__ import annotations

import json

from flexflow_engine.abc.sizes import format_size
from flexflow_engine.cli.progress import progress_on_stderr
from flexflow_engine.cli.session import Json, Overrides, RecipePath, load


def import_(recipe: RecipePath, overrides: Overrides = None, as_json: Json = False) -> None:
    """Import a recipe's checkpoint into the weight store."""
    from flexflow_engine.engine import import_recipe  # noqa: PLC0415  # torch; --help must not import it

    asked, registry = load(recipe, overrides)
    with progress_on_stderr() as progress, import_recipe(asked, registry, progress) as store:
        found = {"path": str(store.path), "nbytes": store.nbytes}
    print(json.dumps(found, indent=2) if as_json else f"{format_size(store.nbytes)} of weights in {store.path}")
