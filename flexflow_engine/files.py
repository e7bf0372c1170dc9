"""Files that appear whole or not at all, their locks and their room, and what the system refuses, told as errors."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from flexflow_engine.errors import StorageError

PARTIAL = ".partial"
"""How the name of a file ends that is not whole yet."""
_FIXES = {
    errno.ENOSPC: "free some space there, or choose a path on a larger disk",
    errno.EDQUOT: "free some space there, or choose a path outside the quota",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or choose another file system",
    errno.EACCES: "choose a path that you may read and write",
    errno.EPERM: "choose a path that you may read and write",
    errno.EROFS: "choose a path on a file system that is mounted writable",
    errno.EIO: "the disk may be failing: look at the system's log, or choose a path on another disk",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENOENT: "run again if the file was removed while it was in use, else choose another path",
    errno.ENOTDIR: "choose a path whose parents are folders",
    errno.EEXIST: "choose a path that is a folder, or does not exist yet",
}


def partial_of(path: Path) -> Path:
    """What a file is called until it is whole."""
    return Path(f"{path}{PARTIAL}")


def own_ending() -> str:
    """How the names of this process's files end that are not whole yet, where other processes write the same ones."""
    return f".{os.getpid()}{PARTIAL}"


@contextmanager
def replacing(path: Path, ending: str = PARTIAL) -> Iterator[Path]:
    """The name under which the body writes a file, which then takes the name `path`; where either fails, it is removed.

    ending: of that name; `own_ending()` where several processes may write at once. Raises StorageError for an OSError.
    """
    partial = Path(f"{path}{ending}")
    try:
        with reporting(path):
            yield partial
            partial.replace(path)
    except BaseException:
        with suppress(OSError):  # the error to tell is the one before
            partial.unlink(missing_ok=True)
        raise


def check_place(path: Path) -> None:
    """Raise StorageError where no regular file can come to `path`; nothing is made or removed there."""
    with reporting(path):
        has_folder, replaceable = path.parent.is_dir(), path.is_file() or not path.exists()
    if not has_folder:
        what = f"the folder {path.parent} is missing"
        raise StorageError(what, where=str(path), fix="make it, or name another file")
    if not replaceable:
        raise StorageError("this is no regular file", where=str(path), fix="name another")


def make_folder(path: Path) -> None:
    """Make a folder, and those around it that are missing. Raises StorageError."""
    with reporting(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:  # nothing was removed: /proc, for one, takes no folders
            raise StorageError("the folder can't be made", where=str(path), fix="choose another path") from error


def nearest_existing(path: Path) -> Path:
    """`path`, or the nearest folder around it that is there. Raises StorageError."""
    with reporting(path):
        return next(existing for existing in (path, *path.absolute().parents) if existing.exists())


def free_nbytes(path: Path) -> int:
    """What is free on the disk where `path` lies, or will lie. Raises StorageError."""
    with reporting(path):
        return shutil.disk_usage(nearest_existing(path)).free


def open_locked(path: Path, operation: int) -> int:
    """A descriptor of the file at `path`, made where there is none, that holds its lock until it is closed.

    operation: flock's. Whoever holds the lock may rename or remove the file: then the next one to get the lock opens
    another. Raises OSError, BlockingIOError where the operation does not wait and somebody holds the lock.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, operation)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def storage_error(error: OSError, path: Path) -> StorageError:
    """The StorageError that tells `error`, met at `path`."""
    reason = error.strerror or str(error)
    return StorageError(reason[:1].lower() + reason[1:], where=str(path), fix=_FIXES.get(error.errno or 0, ""))


class reporting:  # noqa: N801  # used as a function; a generator would cost a small request twice as much
    """Turn an OSError of the body into a StorageError about `path`."""

    __slots__ = ("_path",)

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, OSError):
            raise storage_error(error, self._path) from error
