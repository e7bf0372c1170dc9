"""Files that a run writes when it ends, and whose place is tried when it begins."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flexflow_engine.errors import StorageError
from flexflow_engine.files import check_place, partial_of, replacing, reporting


def check_distinct(outputs: Mapping[str, Path | None], inputs: Mapping[str, Path | None]) -> None:
    """Raise StorageError when a file that is written, by what it is for, is another one, or is one that is read: under
    its own name, or under the one that it has until it is whole.
    """
    seen = {path.resolve(): use for use, path in inputs.items() if path is not None}
    for use, path in outputs.items():
        for written in () if path is None else (path, partial_of(path)):
            if (other := seen.setdefault(written.resolve(), use)) != use:
                what = f"{other} and {use} are the same file"
                raise StorageError(what, where=str(written), fix=f"name another for {use}")


def check_writable(path: Path) -> None:
    """Raise StorageError where no file can be made that will be called `path`; one that is there stays as it is."""
    check_place(path)
    with reporting(path):
        partial_of(path).touch()
        partial_of(path).unlink()


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all. Raises StorageError."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
