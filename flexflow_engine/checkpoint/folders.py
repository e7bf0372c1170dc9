"""Where a checkpoint's files come from: a folder on this machine, or the hub and its cache.

No name that a checkpoint writes down leads out of its folder. The hub's cache keeps its snapshots as links into the
`blobs` folder beside them; those links, and no others, are followed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path, PurePosixPath

from flexflow_engine.errors import CheckpointError
from flexflow_engine.jobs.tokenizer import SETTINGS, VOCABULARIES

TOKENIZER_FILES = (*VOCABULARIES, *SETTINGS, "merges.txt", "chat_template.jinja")
GENERATION = "generation_config.json"
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
TORCH_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_SAFETENSORS_PATTERNS = (*SAFETENSORS, "model-*.safetensors")
_TORCH_PATTERNS = (*TORCH_FILES, "pytorch_model-*.bin")


class CheckpointFolder(ABC):
    """Gives the folder of what is asked for, and fetches it first where it must."""

    @abstractmethod
    def here(self) -> Path | None:
        """The folder with what is on this machine, whatever that is; fetches nothing."""

    @abstractmethod
    def weights(self) -> Path:
        """The folder with config.json and the tensors' files. Raises CheckpointError when they can't be had."""

    @abstractmethod
    def tokenizer(self) -> Path | None:
        """The folder with the tokenizer's files, None when there are none. Raises CheckpointError when they can't be
        had.
        """


class LocalFolder(CheckpointFolder):
    """A folder that the user named."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def here(self) -> Path:
        return self._path

    def file(self, name: str) -> Path:
        return file_inside(self._path, name)

    def weights(self) -> Path:
        return self._path

    def tokenizer(self) -> Path | None:
        return self._path if _has_one(self._path, VOCABULARIES) else None


class HubFolder(CheckpointFolder):
    """A repository of the Hugging Face hub; what its cache holds is used when the hub can't be reached."""

    def __init__(self, hub_id: str) -> None:
        self._hub_id = hub_id

    def here(self) -> Path | None:
        config = self.cached_config()
        return None if config is None else config.parent

    def cached_config(self) -> Path | None:
        """config.json in the cache; no network."""
        found = self._cached("config.json")
        return Path(found) if isinstance(found, str) else None

    def config(self) -> Path:
        """config.json, with generation_config.json beside it where the repository has one: the hub is asked unless the
        cache knows of both. Raises CheckpointError when there is no config.json to be had.
        """
        cached = self.cached_config()
        if cached is not None and self._cached(GENERATION) is not None:
            return cached
        try:
            return self._fetch(("config.json", GENERATION)) / "config.json"
        except CheckpointError:
            if cached is None:
                raise
            return cached

    def weights(self) -> Path:
        """One format is fetched, not both: .bin files only where there are no safetensors."""
        for names, patterns in ((SAFETENSORS, _SAFETENSORS_PATTERNS), (TORCH_FILES, _TORCH_PATTERNS)):
            folder = self._fetch(("config.json", GENERATION, *patterns))
            if _has_one(folder, names):
                return folder
        raise CheckpointError(
            f"found no {SAFETENSORS[0]} and no {TORCH_FILES[0]}, whole or in shards",
            where=self._hub_id,
            fix="if the hub can't be reached from here, fetch the checkpoint elsewhere and name its folder",
        )

    def tokenizer(self) -> Path | None:
        folder = self._fetch(TOKENIZER_FILES)
        return folder if _has_one(folder, VOCABULARIES) else None

    def _cached(self, name: str) -> object:
        """Its path in the cache; None where that does not know it, something else where the repository has none."""
        from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415  # only hub ids need it

        return try_to_load_from_cache(self._hub_id, name)

    def _fetch(self, patterns: tuple[str, ...]) -> Path:
        """The snapshot's folder with the files of `patterns` in it, as far as the repository has them."""
        from huggingface_hub import snapshot_download  # noqa: PLC0415  # only hub ids need it
        from huggingface_hub.errors import LocalEntryNotFoundError  # noqa: PLC0415

        try:
            return Path(snapshot_download(self._hub_id, allow_patterns=list(patterns)))
        except LocalEntryNotFoundError as error:
            raise CheckpointError(
                "not in the Hugging Face cache, and the hub could not be reached",
                where=self._hub_id,
                fix="connect this machine, or fetch the checkpoint elsewhere and name its folder",
            ) from error
        except Exception as error:  # the client raises what its HTTP library raises, which differs by version
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise CheckpointError(
                f"the hub did not give it: {reason[0]}",
                where=self._hub_id,
                fix="check the id, your access to it, and the network; or name a local folder",
            ) from error


def file_inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`, which need not exist. Raises CheckpointError when it would lie elsewhere."""
    relative = PurePosixPath(name)
    path = folder / relative
    if relative.is_absolute() or ".." in relative.parts or not _leads_inside(folder, path):
        raise CheckpointError(
            f"the file name {name!r} leads out of the checkpoint's folder",
            where=str(folder),
            fix="use a checkpoint whose files all lie in its own folder",
        )
    return path


def _leads_inside(folder: Path, path: Path) -> bool:
    target, home = path.resolve(), folder.resolve()
    if target.is_relative_to(home):
        return True
    repository = home.parent.parent
    is_snapshot = home.parent.name == "snapshots" and repository.name.startswith("models--")
    return is_snapshot and target.is_relative_to(repository / "blobs")


def _has_one(folder: Path, names: tuple[str, ...]) -> bool:
    return any((folder / name).exists() for name in names)
