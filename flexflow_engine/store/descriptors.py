"""Open files, at most a certain number at a time.

Changing state: `_entries`, the open files by path, least recently used first, each with the number of its borrowers.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

DEFAULT_LIMIT = 128
"""Well below the usual limit of 1024 for a process; a tier and a weight store each have their own."""


@dataclass(slots=True)
class Borrowed:
    """An open file; its borrowers share it."""

    descriptor: int
    borrowers: int = 0


class Descriptors:
    """File descriptors opened on demand and kept for reuse. Thread-safe; owns what it opened until `close`."""

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        """limit: files kept open; exceeded only while more than that are borrowed at once."""
        self._limit = limit
        self._entries: OrderedDict[Path, Borrowed] = OrderedDict()
        self._lock = Lock()

    def borrow(self, path: Path, open_file: Callable[[], int]) -> Borrowed:
        """The file at `path`, which `open_file` opens (and checks) when it is not open yet; until `give_back`."""
        return self._borrow_open(path) or self._borrow_new(path, open_file)

    def give_back(self, file: Borrowed) -> None:
        with self._lock:
            file.borrowers -= 1
            if len(self._entries) > self._limit:
                self._close_surplus()

    def drop(self, path: Path) -> None:
        """Close `path` if it is open; nobody may be borrowing it."""
        with self._lock:
            entry = self._entries.pop(path, None)
        if entry is not None:
            assert entry.borrowers == 0, path
            os.close(entry.descriptor)

    def close(self) -> None:
        """Close every file. Idempotent."""
        with self._lock:
            entries = list(self._entries.values())
            self._entries.clear()
        for entry in entries:
            os.close(entry.descriptor)

    def _borrow_open(self, path: Path) -> Borrowed | None:
        with self._lock:
            entry = self._entries.get(path)
            if entry is not None:
                entry.borrowers += 1
                self._entries.move_to_end(path)
            return entry

    def _borrow_new(self, path: Path, open_file: Callable[[], int]) -> Borrowed:
        descriptor = open_file()  # outside the lock: it reads the index, and others must not wait for that
        with self._lock:
            entry = self._entries.setdefault(path, Borrowed(descriptor))
            entry.borrowers += 1
            self._close_surplus()
        if entry.descriptor != descriptor:
            os.close(descriptor)  # another thread opened the same file meanwhile
        return entry

    def _close_surplus(self) -> None:
        surplus = len(self._entries) - self._limit
        if surplus <= 0:
            return
        idle = [path for path, entry in self._entries.items() if entry.borrowers == 0]
        for path in idle[:surplus]:
            os.close(self._entries.pop(path).descriptor)
