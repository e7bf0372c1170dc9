"""The imported weight stores under a root, and removing one."""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

from flexflow_engine.checkpoint.importing import WEIGHTS, locked
from flexflow_engine.errors import StorageError
from flexflow_engine.files import reporting
from flexflow_engine.store.array import METADATA
from flexflow_engine.store.header import header_or_none


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreEntry:
    """One weight store. What an unreadable one does not tell is empty."""

    name: str
    """Of its folder; what `remove_store` takes."""
    path: Path
    reference: str
    dtype: str
    codec: str
    table_codec: str
    nbytes: int
    """Bytes that its files hold now."""
    complete: bool


def list_stores(root: Path) -> tuple[StoreEntry, ...]:
    """Every store under `root`, by name, unfinished and unreadable ones too. Raises StorageError."""
    folder = root / WEIGHTS
    with reporting(folder):
        paths = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.exists() else []
    return tuple(_entry(path) for path in paths)


def remove_store(root: Path, name: str) -> StoreEntry:
    """Remove the store called `name` and say what it was; waits for an import that is writing it.

    Nothing may be reading it. Raises StorageError when there is no such store or it can't be removed.
    """
    entry = next((entry for entry in list_stores(root) if entry.name == name), None)
    if entry is None:
        known = ", ".join(entry.name for entry in list_stores(root)) or "none"
        raise StorageError(f"there is no weight store {name!r}", where=str(root / WEIGHTS), fix=f"there are: {known}")
    with locked(entry.path), reporting(entry.path):
        (entry.path / METADATA).unlink(missing_ok=True)  # first: half a store must not look like a whole one
        shutil.rmtree(entry.path)
    return entry


def _entry(path: Path) -> StoreEntry:
    header = header_or_none(path)
    return StoreEntry(
        name=path.name,
        path=path,
        reference=header.reference if header else "",
        dtype=header.dtype if header else "",
        codec=header.codec if header else "",
        table_codec=header.table_codec if header else "",
        nbytes=_nbytes(path),
        complete=header is not None and header.complete,
    )


def _nbytes(folder: Path) -> int:
    """Of the files in it; an import may rename or remove some meanwhile."""
    nbytes = 0
    with reporting(folder):
        for path in folder.rglob("*"):
            with suppress(FileNotFoundError):
                found = path.stat()
                nbytes += found.st_size if S_ISREG(found.st_mode) else 0
    return nbytes
