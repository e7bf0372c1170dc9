"""A cap on the memory of a process with everything it causes: its heap, the interpreter, and its page cache.

A control group is made for the command and removed after it; version 1 and version 2 of cgroups both do, and both need
root. See "Memory Resource Controller" and "Control Group v2" in the kernel's documentation.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


@dataclass(frozen=True, slots=True)
class MemoryCap:
    """A live control group."""

    folder: Path
    peak_file: str

    @property
    def peak_bytes(self) -> int:
        """The most that was charged to the group so far; its cap, where page cache filled it."""
        return int((self.folder / self.peak_file).read_text())

    def wrap(self, command: Sequence[str]) -> list[str]:
        """The command, joining the group before it starts."""
        return ["sh", "-c", f'echo $$ > "{self.folder}/cgroup.procs"; exec "$@"', "sh", *command]


@contextmanager
def memory_cap(nbytes: int) -> Iterator[MemoryCap]:
    """Raises SystemExit where no control group can be made."""
    name = f"flexflow-benchmark-{secrets.token_hex(4)}"
    version_1 = (ROOT / "memory").is_dir()
    cap = (
        MemoryCap(ROOT / "memory" / name, "memory.max_usage_in_bytes")
        if version_1
        else MemoryCap(ROOT / name, "memory.peak")
    )
    limit_file = "memory.limit_in_bytes" if version_1 else "memory.max"
    try:
        if not version_1:
            (ROOT / "cgroup.subtree_control").write_text("+memory")
        cap.folder.mkdir()
    except OSError as error:
        raise SystemExit(f"a memory cap needs root and cgroups with a memory controller: {error}") from error
    try:
        (cap.folder / limit_file).write_text(str(nbytes))
        yield cap
    finally:
        _remove(cap.folder)


def drop_page_cache() -> str:
    """Empty the page cache of the machine. What to call the caches' state: cold, or as they were without root.

    A page that another process has read is not charged to a capped one, which would get it for nothing.
    """
    os.sync()
    try:
        DROP_CACHES.write_text("3")
    except OSError:
        return "as they were"
    return "cold"


def _remove(folder: Path) -> None:
    """Killed processes leave their group a moment later."""
    for _ in range(100):
        with contextlib.suppress(OSError):
            folder.rmdir()
            return
        time.sleep(0.1)
