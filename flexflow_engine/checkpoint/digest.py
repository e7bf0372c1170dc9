"""What a checkpoint's content is called, so that a moved or copied checkpoint finds its weight store again.

Reading hundreds of gigabytes at every start would cost minutes: a file's digest is remembered under its path, size,
modification time and inode.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from flexflow_engine.errors import CheckpointError, StorageError
from flexflow_engine.files import own_ending, replacing

_BUFFER_NBYTES = 4 * 2**20


class DigestCache:
    """SHA-256 of files, remembered in one JSON file. A lost or broken cache costs time and nothing else.

    Changing state: `_found`, what this object has found, which it knows where the file can't be written too.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[str, Any] = {}

    def content_key(self, files: Mapping[str, Path], progress: Callable[[int, int], None]) -> str:
        """One digest of all `files`, by name and content. Raises CheckpointError when one can't be read."""
        total = sum(_stat(path).st_size for path in files.values())
        known, key, done = self._load() | self._found, hashlib.sha256(), 0
        for name in sorted(files):
            size = _stat(files[name]).st_size
            digest = self._digest(files[name], known, lambda read, done=done: progress(done + read, total))  # type: ignore[misc]  # a default binds the loop's value
            key.update(f"{name} {digest}\n".encode())
            done += size
        return key.hexdigest()

    def _digest(self, path: Path, known: dict[str, Any], progress: Callable[[int], None]) -> str:
        entry, stamp = known.get(str(path.resolve())), _stamp(path)
        if isinstance(entry, list) and entry[:-1] == stamp and isinstance(entry[-1], str):
            return entry[-1]
        digest = _sha256(path, progress)
        if stamp == _stamp(path):
            known[str(path.resolve())] = self._found[str(path.resolve())] = [*stamp, digest]
            self._store(known)
        return digest

    def _load(self) -> dict[str, Any]:
        try:
            known = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}

    def _store(self, known: dict[str, Any]) -> None:
        """Best effort: a cache that can't be written is a slow start next time, not an error."""
        with suppress(StorageError), replacing(self._path, own_ending()) as partial:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(known))


def _stamp(path: Path) -> list[int]:
    stat = _stat(path)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise CheckpointError(f"the file can't be read: {error.strerror}", where=str(path)) from error


def _sha256(path: Path, progress: Callable[[int], None]) -> str:
    digest, buffer, done = hashlib.sha256(), memoryview(bytearray(_BUFFER_NBYTES)), 0
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
                done += count
                progress(done)
    except OSError as error:
        raise CheckpointError(f"the file can't be read: {error.strerror}", where=str(path)) from error
    return digest.hexdigest()
