"""Files that a run writes when it ends, and whose place is tried when it begins."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flexflow_engine.errors import StorageError
from flexflow_engine.files import PARTIAL, replacing


def check_distinct(outputs: Mapping[str, Path | None], inputs: Mapping[str, Path | None]) -> None:
    """Raise StorageError when a file that is written, by what it is for, is another one, or is one that is read."""
    seen = {path.resolve(): use for use, path in inputs.items() if path is not None}
    for use, path in outputs.items():
        if path is not None and (other := seen.setdefault(path.resolve(), use)) != use:
            raise StorageError(f"{other} and {use} are the same file", where=str(path), fix=f"name another for {use}")


def check_writable(path: Path) -> None:
    """Raise StorageError when no regular file can be made at `path`; an existing one is left as it is."""
    try:
        replaceable = path.is_file() or not path.exists()
        if replaceable:
            partial = path.with_name(path.name + PARTIAL)
            partial.touch()
            partial.unlink()
    except OSError as error:
        raise StorageError(f"it can't be written ({error.strerror})", where=str(path)) from error
    if not replaceable:
        raise StorageError("this is no regular file, name another", where=str(path))


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all. Raises StorageError."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
