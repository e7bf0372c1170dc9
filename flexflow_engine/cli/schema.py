"""`schema`: what may stand in a recipe."""

from __future__ import annotations

import json

from flexflow_engine.jobs.schema import recipe_schema


def schema() -> None:
    """Print the JSON schema of recipes; editors check and complete YAML with it."""
    print(json.dumps(recipe_schema(), indent=2))
