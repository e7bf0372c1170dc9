"""Files that a run writes when it ends, and whose place is tried when it begins."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from flexflow_engine.errors import StorageError


def check_writable(path: Path) -> None:
    """Raise StorageError when no regular file can be made at `path`; an existing one is left as it is."""
    with LateFile(path):
        pass


def check_distinct(outputs: Mapping[str, Path | None], inputs: Mapping[str, Path | None]) -> None:
    """Raise StorageError when a file that is written, by what it is for, is another one, or is one that is read."""
    seen = {path.resolve(): use for use, path in inputs.items() if path is not None}
    for use, path in outputs.items():
        if path is not None and (other := seen.setdefault(path.resolve(), use)) != use:
            raise StorageError(f"{other} and {use} are the same file", where=str(path), fix=f"name another for {use}")


class LateFile:
    """A small text file that appears whole or not at all; None stands for a file nobody asked for.

    Entering makes `<path>.partial`, leaving without `finish` removes it.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def __enter__(self) -> Self:
        try:
            replaceable = self._path is None or self._path.is_file() or not self._path.exists()
        except OSError as error:
            raise StorageError(f"it can't be written ({error.strerror})", where=str(self._path)) from error
        if not replaceable:
            raise StorageError("this is no regular file, name another", where=str(self._path))
        self._write("")
        return self

    def finish(self, text: str) -> None:
        """Write the file under its own name. Raises StorageError."""
        self._write(text)
        if self._partial and self._path:
            self._partial.replace(self._path)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._partial:
            self._partial.unlink(missing_ok=True)

    @property
    def _partial(self) -> Path | None:
        return self._path.with_name(f"{self._path.name}.partial") if self._path else None

    def _write(self, text: str) -> None:
        try:
            if self._partial:
                self._partial.write_text(text, encoding="utf-8")
        except OSError as error:
            raise StorageError(f"it can't be written ({error.strerror})", where=str(self._path)) from error
