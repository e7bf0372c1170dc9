"""config.json and generation_config.json, and the model plugin that reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexflow_engine.abc.model import Model
from flexflow_engine.checkpoint.folders import GENERATION, file_inside
from flexflow_engine.errors import CheckpointError

EOS = "eos_token_id"


def read_config_file(path: Path) -> Mapping[str, Any]:
    """The content of a config.json, with the `eos_token_id` of the generation_config.json beside it, which counts more
    for transformers too. Raises CheckpointError when one of them is not a JSON object, or the latter names an end that
    is no token id.
    """
    config, eos = _read(path), _generation_eos(file_inside(path.parent, GENERATION))
    return config if eos is None else {**config, EOS: eos}


def published_config(reference: str, model_class: type[Model]) -> Mapping[str, Any] | None:
    """The config of a hub id that the plugin knows by heart, whatever its case; None for any other."""
    for hub_id, config in model_class.published().items():
        if hub_id.casefold() == reference.casefold():
            return config
    return None


def check_model_type(config: Mapping[str, Any], model_class: type[Model], *, where: str) -> None:
    """Raises CheckpointError when the plugin does not read the config's `model_type`."""
    model_type = config.get("model_type")
    if model_type not in model_class.model_types:
        raise CheckpointError(
            f"model plugin `{model_class.name}` does not read model_type {model_type!r}",
            where=where,
            fix=f"it reads {', '.join(model_class.model_types)}; `plugins` lists the model plugins that are installed",
        )


def _generation_eos(path: Path) -> int | list[int] | None:
    """None where the file names none, or is not there."""
    eos: int | list[int] | None = _read(path).get(EOS) if path.exists() else None
    if eos is None or all(isinstance(token, int) for token in (eos if isinstance(eos, list) else [eos])):
        return eos
    raise CheckpointError(f"{EOS} is {eos!r}", where=str(path), fix="a token id or a list of them would do")


def _read(path: Path) -> Mapping[str, Any]:
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
