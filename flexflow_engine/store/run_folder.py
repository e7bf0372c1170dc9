"""A folder for what one run keeps on a disk, gone when the run ends, or when the next begins.

<root>/runs/<pid>-<random>/         whatever the run puts there
<root>/runs/<pid>-<random>/lock     held with flock while the run lives; one block
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from flexflow_engine.files import make_folder, reporting
from flexflow_engine.store.shard import BLOCK_NBYTES

_LOCK = "lock"


class RunFolder:
    """A folder for one run's files. Folders of runs that died are removed when a new one is made."""

    def __init__(self, root: Path) -> None:
        """Raises StorageError when `root` can't be written."""
        runs = root / "runs"
        make_folder(runs)
        with reporting(runs):
            _remove_dead(runs)
            self.path, self._lock = _make_locked(runs)
        self._closed = False

    @property
    def sample(self) -> Path:
        """A file of one block, to find out on it what I/O the file system takes."""
        return self.path / _LOCK

    def close(self) -> None:
        """Remove the folder with everything in it. Idempotent."""
        if self._closed:
            return
        self._closed = True
        try:
            with reporting(self.path):
                _remove(self.path)
        finally:
            os.close(self._lock)


def _make_locked(runs: Path) -> tuple[Path, int]:
    """A new folder in `runs` and the descriptor that holds its lock.

    Until it is locked, another run that begins may take it for that of a dead one and remove it: then it is made anew.
    """
    while True:
        folder = runs / f"{os.getpid()}-{secrets.token_hex(4)}"
        folder.mkdir()
        with suppress(FileNotFoundError, BlockingIOError):
            return folder, _lock(folder)


def _lock(folder: Path) -> int:
    """The descriptor that holds the lock of a new folder, which is removed where it can't be locked.

    Raises FileNotFoundError or BlockingIOError when somebody else removes it.
    """
    lock = None
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(lock, bytes(BLOCK_NBYTES))  # something to try direct I/O on
        (folder / _LOCK).stat()  # who locked it before has removed it
    except BaseException:
        if lock is not None:
            os.close(lock)
        with suppress(OSError):  # the error to tell is the one before
            _remove(folder)
        raise
    return lock


def _remove_dead(runs: Path) -> None:
    """Remove the folders in `runs` whose lock nobody holds; what belongs to another user is left alone."""
    for folder in sorted(runs.iterdir()):
        with suppress(OSError):
            _remove_unless_locked(folder)


def _remove_unless_locked(folder: Path) -> None:
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR)
    except FileNotFoundError:
        folder.rmdir()  # its run was killed before it had made the lock, or when nothing else was left to remove
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(folder)
    finally:
        os.close(lock)


def _remove(folder: Path) -> None:
    """Remove a locked folder, its lock last: until then nobody else may take it, and then a run that begins may."""
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != _LOCK:
            entry.unlink()
    (folder / _LOCK).unlink(missing_ok=True)
    with suppress(FileNotFoundError):
        folder.rmdir()
