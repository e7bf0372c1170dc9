"""A checkpoint that is a set of files: safetensors or torch's own, whole or in shards."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from flexflow_engine.abc.dtypes import DType
from flexflow_engine.abc.model import Model
from flexflow_engine.checkpoint.checkpoint import ByteProgress, Checkpoint, silent
from flexflow_engine.checkpoint.digest import DigestCache
from flexflow_engine.checkpoint.folders import SAFETENSORS, TORCH_FILES, CheckpointFolder, file_inside
from flexflow_engine.checkpoint.places import NOT_QUANTIZED, TensorPlace, safetensors_places, torch_places
from flexflow_engine.errors import CheckpointError, FlexFlowError, ProblemsError, raise_problems
from flexflow_engine.user_cache import user_cache

_READERS: Mapping[tuple[str, str], Callable[[Path], dict[str, TensorPlace]]] = {
    SAFETENSORS: safetensors_places,  # preferred where both formats exist
    TORCH_FILES: torch_places,
}
_NUMBERS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class FilesCheckpoint(Checkpoint):
    """Tensors found through the files' own headers; the data are read page by page."""

    def __init__(
        self,
        reference: str,
        config: Mapping[str, Any],
        model_class: type[Model],
        dtype: DType,
        folder: CheckpointFolder,
    ) -> None:
        super().__init__(reference, config, model_class, dtype)
        self._folder = folder

    @property
    def tokenizer_folder(self) -> Path | None:
        return self._folder.tokenizer()

    @property
    def is_fetched(self) -> bool:
        folder = self._folder.here()
        try:
            return folder is not None and bool(_find_shards(folder).names)
        except (CheckpointError, ProblemsError):
            return False

    def content_key(self, progress: ByteProgress = silent) -> str:
        shards = self._shards
        files = {name: file_inside(shards.folder, name) for name in ("config.json", *shards.names)}
        return self._digests.content_key(files, progress)

    def tensor_names(self) -> frozenset[str]:
        return frozenset(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name].shape

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._places[name].read_rows(start, stop)

    def problem(self, name: str, shape: tuple[int, ...]) -> CheckpointError | None:
        dtype = self._places[name].dtype
        if dtype in _NUMBERS:
            return super().problem(name, shape)
        return CheckpointError(
            f"{name} is stored as {str(dtype).removeprefix('torch.')}",
            where=self.place(name),
            fix=NOT_QUANTIZED,
        )

    def place(self, name: str) -> str:
        return str(self._places[name].path)

    @cached_property
    def _digests(self) -> DigestCache:
        return DigestCache(user_cache() / "digests.json")

    @cached_property
    def _shards(self) -> _Shards:
        return _find_shards(self._folder.weights())

    @cached_property
    def _places(self) -> dict[str, TensorPlace]:
        """Every tensor; all that is wrong with the files is told at once."""
        shards, places, problems = self._shards, dict[str, TensorPlace](), list[FlexFlowError]()
        for name in shards.names:
            try:
                found = shards.read(file_inside(shards.folder, name))
            except CheckpointError as error:
                problems.append(error)
                continue
            problems += _lacking(shards, name, found)
            places |= found
        raise_problems(problems)
        return places


@dataclass(frozen=True, slots=True)
class _Shards:
    """The files of one format."""

    folder: Path
    read: Callable[[Path], dict[str, TensorPlace]]
    expected: Mapping[str, Iterable[str]]
    """File name -> the tensors that the index promises in it; a single file has no index."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.expected))


def _find_shards(folder: Path) -> _Shards:
    for (single, index), read in _READERS.items():
        if (folder / single).exists():
            return _Shards(folder, read, {single: ()})
        if (folder / index).exists():
            return _Shards(folder, read, _read_index(folder, index))
    looked_for = ", ".join(name for names in _READERS for name in names)
    raise CheckpointError("the folder holds no weights", where=str(folder), fix=f"looked for {looked_for}")


def _read_index(folder: Path, index: str) -> dict[str, list[str]]:
    """Tensor names by file, from an index's `weight_map`."""
    path = file_inside(folder, index)
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        pairs = [(str(tensor), str(name)) for tensor, name in weight_map.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError("the index can't be read", where=str(path), fix="fetch the checkpoint again") from error
    tensors: dict[str, list[str]] = {}
    for tensor, name in pairs:
        tensors.setdefault(name, []).append(tensor)
    _check_shards(folder, path, tensors)
    return tensors


def _check_shards(folder: Path, index: Path, tensors: Mapping[str, list[str]]) -> None:
    """Every file of the index must lie in the folder, and be there."""
    problems: list[FlexFlowError] = []
    for name in sorted(tensors):
        try:
            if not file_inside(folder, name).is_file():
                problems.append(
                    CheckpointError(
                        f"the file {name} is missing, which should hold {len(tensors[name])} tensors",
                        where=str(index),
                        fix="fetch the checkpoint again",
                    )
                )
        except CheckpointError as error:
            problems.append(error)
    raise_problems(problems)


def _lacking(shards: _Shards, name: str, found: Mapping[str, TensorPlace]) -> list[FlexFlowError]:
    return [
        CheckpointError(f"the index promises {tensor}, which the file lacks", where=str(shards.folder / name))
        for tensor in shards.expected[name]
        if tensor not in found
    ]
