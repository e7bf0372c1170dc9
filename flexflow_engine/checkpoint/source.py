"""Opening a checkpoint, whatever its kind. Opening reads config.json; tensors are looked at when they are asked for."""

from __future__ import annotations

from pathlib import Path

from flexflow_engine.abc.dtypes import DType
from flexflow_engine.abc.model import Model
from flexflow_engine.checkpoint.checkpoint import Checkpoint
from flexflow_engine.checkpoint.config import published_config, read_config_file
from flexflow_engine.checkpoint.files import FilesCheckpoint
from flexflow_engine.checkpoint.folders import HubFolder, LocalFolder
from flexflow_engine.checkpoint.synthetic import open_synthetic
from flexflow_engine.errors import CheckpointError
from flexflow_engine.jobs.references import SYNTHETIC, is_hub_id


def open_checkpoint(reference: str, model_class: type[Model], *, dtype: DType) -> Checkpoint:
    """The checkpoint that `reference` names: a folder's absolute path, a hub id, or `synthetic:` and a published model.

    dtype: what the weights will be computed in. Raises CheckpointError when there is no such checkpoint, or the model
    does not read it.
    """
    if reference.startswith(SYNTHETIC):
        return open_synthetic(reference, model_class, dtype)
    if is_hub_id(reference):
        return _open_hub(reference, model_class, dtype)
    folder = Path(reference).expanduser()
    if folder.is_dir():
        return _open_local(reference, folder, model_class, dtype)
    raise CheckpointError(
        f"there is no checkpoint {reference!r}",
        fix=f"name an existing folder, a hub id such as facebook/opt-1.3b, or {SYNTHETIC}opt-1.3b",
    )


def _open_local(reference: str, folder: Path, model_class: type[Model], dtype: DType) -> Checkpoint:
    files = LocalFolder(folder)
    config = read_config_file(files.file("config.json"))
    return FilesCheckpoint(reference, config, model_class, dtype, files)


def _open_hub(reference: str, model_class: type[Model], dtype: DType) -> Checkpoint:
    """The config comes from the cache, which the hub completes, else from what the plugin knows, else from the hub."""
    files = HubFolder(reference)
    config = published_config(reference, model_class)
    if config is None or files.cached_config() is not None:
        config = read_config_file(files.config())
    return FilesCheckpoint(reference, config, model_class, dtype, files)
