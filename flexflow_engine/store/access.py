"""How an owner of files reads and writes them: past the system's page cache where the file system allows it.

Direct I/O moves whole blocks of a file from and to aligned memory. What does not begin or end at a block, in the file
or in memory, and what is compressed, goes through a buffer: one for each thread at work, of one size, made once. Where
direct I/O is refused the same code moves the same blocks through the page cache.

Changing state of `Access`: `_idle`, the buffers that nobody has borrowed; `_reading`, how many more reads may begin.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any

from flexflow_engine.abc.tier import HostBytes
from flexflow_engine.cpu.mapping import populated_bytes
from flexflow_engine.files import reporting
from flexflow_engine.store.descriptors import Descriptors
from flexflow_engine.store.shard import BLOCK_NBYTES

BUFFER_NBYTES = 4 * 2**20
READS_AT_ONCE = 2
"""At the disk, of however many threads: a virtual disk gave 3.8 GB/s to two requests at all times, and 3.5 to three
threads whose requests come and go, because each of them checks what it has read.
"""
_REFUSALS = {errno.EINVAL, errno.EOPNOTSUPP}


@dataclass(frozen=True, slots=True)
class Mode:
    """A way to open files and what it asks of memory."""

    flags: int
    """For os.open."""
    memory_alignment: int
    """Memory that is moved without a buffer begins at a multiple of this, and has a multiple of this in bytes."""


BUFFERED = Mode(flags=0, memory_alignment=1)
MODES = (
    Mode(flags=getattr(os, "O_DIRECT", 0), memory_alignment=512),
    Mode(flags=getattr(os, "O_DIRECT", 0), memory_alignment=BLOCK_NBYTES),  # disks of 4 KiB sectors before Linux 6.0
    BUFFERED,
)
"""Best first; the last works everywhere."""


@dataclass(slots=True)
class OpenFile:
    """A file, borrowed with what one call needs to move its bytes. Nobody changes it; freezing costs time a request."""

    descriptor: int
    mode: Mode
    buffer: HostBytes
    """uint8 [whole blocks], block-aligned; the borrower's alone."""
    reading: AbstractContextManager[Any]
    """To be held while the disk reads."""


class Access:
    """Descriptors and buffers of one owner's files, all on one file system. Thread-safe; owned until `close`."""

    def __init__(self, mode: Mode, *, buffer_nbytes: int = BUFFER_NBYTES) -> None:
        """buffer_nbytes: whole blocks, three at least."""
        self.mode = mode
        self._buffer_nbytes = buffer_nbytes
        self._descriptors = Descriptors()
        self._idle: list[HostBytes] = []
        self._reading = BoundedSemaphore(READS_AT_ONCE)

    @classmethod
    def tried_on(cls, sample: Path) -> Access:
        """The best that works with `sample`, a file that is not empty. Raises StorageError when it can't be read."""
        return cls(next(mode for mode in MODES if _reads(sample, mode)))

    def widen(self, buffer_nbytes: int) -> None:
        """Have buffers of at least `buffer_nbytes`, whole blocks, from now on; nobody may be borrowing one."""
        if buffer_nbytes > self._buffer_nbytes:
            self._buffer_nbytes = buffer_nbytes
            self._idle.clear()

    def notices(self, folder: Path) -> tuple[str, ...]:
        """What the user should know about the file system of `folder`, where the files lie; a line each."""
        if self.mode is not BUFFERED:
            return ()
        return (
            f"{folder}: the file system refuses direct I/O; what is read and written there goes through the system's "
            "page cache, which takes memory and processor time",
        )

    @contextmanager
    def lend(self, path: Path, open_file: Callable[[], int]) -> Iterator[OpenFile]:
        """The file at `path`, which `open_file` opens with `mode`'s flags when it is not open yet."""
        borrowed = self._descriptors.borrow(path, open_file)
        try:
            with self.using(borrowed.descriptor) as file:
                yield file
        finally:
            self._descriptors.give_back(borrowed)

    @contextmanager
    def using(self, descriptor: int) -> Iterator[OpenFile]:
        """A descriptor that the caller opened with `mode`'s flags, and a buffer."""
        try:
            buffer = self._idle.pop()
        except IndexError:  # as many as there are threads at work at once
            buffer = populated_bytes(self._buffer_nbytes)
        try:
            yield OpenFile(descriptor, self.mode, buffer, self._reading)
        finally:
            self._idle.append(buffer)

    def drop(self, path: Path) -> None:
        """Close `path` if it is open; nobody may be borrowing it."""
        self._descriptors.drop(path)

    def close(self) -> None:
        """Close every file and give the buffers back. Idempotent; lending again opens and makes them anew."""
        self._descriptors.close()
        self._idle.clear()


def _reads(path: Path, mode: Mode) -> bool:
    """Whether a block of `path` can be read into memory that is aligned no better than the mode asks for."""
    memory: Any = populated_bytes(2 * BLOCK_NBYTES)[mode.memory_alignment % BLOCK_NBYTES :][:BLOCK_NBYTES]
    with reporting(path):
        try:
            descriptor = os.open(path, os.O_RDONLY | mode.flags)
            try:
                return os.preadv(descriptor, [memory], 0) > 0
            finally:
                os.close(descriptor)
        except OSError as error:
            if error.errno in _REFUSALS:
                return False
            raise
