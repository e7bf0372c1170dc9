"""config.json, and the model plugin that reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexflow_engine.abc.model import Model
from flexflow_engine.errors import CheckpointError


def read_config_file(path: Path) -> Mapping[str, Any]:
    """The content of a config.json. Raises CheckpointError when it is not a JSON object."""
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(
            "there is no config.json", where=str(path.parent), fix="name the folder that save_pretrained wrote"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"can't be read as JSON: {error}", where=str(path)) from error
    if not isinstance(config, dict):
        raise CheckpointError("is not a JSON object", where=str(path))
    return config


def published_config(reference: str, models: Mapping[str, type[Model]]) -> Mapping[str, Any] | None:
    """The config of a hub id that a plugin knows by heart, whatever its case; None for any other."""
    for name in sorted(models):
        for hub_id, config in models[name].published().items():
            if hub_id.casefold() == reference.casefold():
                return config
    return None


def find_model(models: Mapping[str, type[Model]], name: str) -> type[Model]:
    """The plugin called `name`. Raises CheckpointError."""
    if name not in models:
        raise CheckpointError(f"there is no model plugin {name!r}", fix=f"one of {_listed(models)} would do")
    return models[name]


def detect_model(config: Mapping[str, Any], models: Mapping[str, type[Model]], *, where: str) -> type[Model]:
    """The one plugin that reads the config's `model_type`. Raises CheckpointError when there are none or several."""
    model_type = config.get("model_type")
    fitting = {name: model for name, model in models.items() if model_type in model.model_types}
    if not fitting:
        known = _listed({kind for model in models.values() for kind in model.model_types})
        raise CheckpointError(
            f"no model plugin reads model_type {model_type!r}", where=where, fix=f"known types are {known}"
        )
    if len(fitting) > 1:
        raise CheckpointError(
            f"several model plugins read model_type {model_type!r}",
            where=where,
            fix=f"name one of {_listed(fitting)} as model.plugin",
        )
    return next(iter(fitting.values()))


def _listed(names: Mapping[str, Any] | set[str]) -> str:
    return ", ".join(sorted(names))
