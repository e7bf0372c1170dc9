"""Files that a run writes when it ends, and whose place is tried when it begins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from flexflow_engine.errors import StorageError
from flexflow_engine.files import partial_of, replacing


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


def check_place(path: Path) -> None:
    """Raise StorageError where no regular file can come to `path`; nothing is made or removed there."""
    with _refusing(path):
        path.parent.stat()
        replaceable = path.is_file() or not path.exists()
    if not replaceable:
        raise StorageError("this is no regular file, name another", where=str(path))


def check_writable(path: Path) -> None:
    """The same, and that one can be made; an existing one is left as it is."""
    check_place(path)
    with _refusing(path):
        partial_of(path).touch()
        partial_of(path).unlink()


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all. Raises StorageError."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"it can't be written ({error.strerror})", where=str(path)) from error
