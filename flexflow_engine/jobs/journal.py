"""The completions of a job that is not done: what a crash leaves, and the next run of the job goes on with.

{"flexflow_engine": {"checkpoint": …, "prompts": …, …}}    whose they are
{"custom_id": …, "token_ids": …, …}                        one line each, as their sequences ended
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from flexflow_engine.errors import StorageError
from flexflow_engine.files import open_locked

if TYPE_CHECKING:
    from flexflow_engine.jobs.identity import JobIdentity

KEY = "flexflow_engine"
TRIAL_NBYTES = 4096


@dataclass(frozen=True, slots=True)
class Place:
    """A line of the file, its end included."""

    offset: int
    nbytes: int


class Journal:
    """No other run has the file while this one is open. Used from one thread; methods raise OSError.

    Constant: `path`, `notice`. Changing:
        _begun    whether the file begins with this job's line
        _foreign  whether it is of another job, or taken for one, and gets another name when this one begins
        _end      bytes of the file that are whole lines; of another job's, all
    """

    def __init__(self, path: Path, identity: JobIdentity, *, fresh: bool) -> None:
        """identity: of the job. fresh: whether a file that is there is taken for another job's.

        Raises StorageError when another run has the file, OSError when it can't be written, so that both are known
        before the run.
        """
        self.path = path
        self.notice = ""
        """What to tell of a file that was there."""
        self._identity = identity
        self._begun = False
        self._foreign = False
        self._file = _open_alone(path)
        self._end = self._file.seek(0, os.SEEK_END)
        try:
            self._try_out()
            self._compare(fresh=fresh)
        except BaseException:
            self.close()
            raise

    def lines(self) -> Iterator[tuple[Place, dict[str, Any]]]:
        """The job's completions so far. What a kill or a power loss left behind the last whole line is dropped."""
        if not self._begun:
            return
        self._file.seek(self._end)
        for raw in self._file:
            line = _parse(raw)
            if line is None:
                break
            yield self._advance(raw), line
        self._file.truncate(self._end)

    def append(self, line: Mapping[str, Any]) -> Place:
        """Add a completion; whatever then happens to this process, it is kept."""
        if not self._begun:
            self._begin()
        return self._write(line)

    def read(self, place: Place) -> bytes:
        return os.pread(self._file.fileno(), place.nbytes, place.offset)

    def remove(self) -> None:
        """Its completions have another place now."""
        self.path.unlink()
        self._file.close()  # only now: the lock ends with it

    def close(self) -> None:
        """Let go of the file; an empty one is removed. Idempotent."""
        with suppress(OSError):  # of a full disk, which `append` has told
            if not self._end and not self._file.closed:
                self.path.unlink(missing_ok=True)
            self._file.close()

    def _compare(self, *, fresh: bool) -> None:
        self._file.seek(0)
        first = self._file.readline()
        if not first.strip() and not self._file.read().strip():  # at most what a trial left
            self._end = self._file.truncate(0)
            return
        reason = "is not gone on with" if fresh else self._reason_against(first)
        if not reason:
            self._begun, self._end = True, len(first)
            return
        self._foreign = True
        self.notice = f"{self.path} {reason}: it will be kept as {_free_name(self.path)}"

    def _reason_against(self, first: bytes) -> str:
        """Why the file is not of this job, by its first line; empty where it is."""
        differences = self._identity.differences((_parse(first) or {}).get(KEY))
        if differences == ():
            return ""
        how = f" (different: {', '.join(differences)})" if differences else ""
        return f"is of another job{how}"

    def _begin(self) -> None:
        if self._foreign:
            self.path.rename(_free_name(self.path))
            self._file.close()
            self._file, self._end, self._foreign = _open_alone(self.path), 0, False
        self._write({KEY: self._identity.as_json()})
        self._begun = True

    def _write(self, line: Mapping[str, Any]) -> Place:
        raw = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        self._file.seek(self._end)
        self._file.write(raw)
        self._file.flush()
        return self._advance(raw)

    def _advance(self, raw: bytes) -> Place:
        place = Place(self._end, len(raw))
        self._end += len(raw)
        return place

    def _try_out(self) -> None:
        """Find a full disk or a used-up quota now."""
        try:
            self._file.write(b"\n" * TRIAL_NBYTES)
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            self._file.truncate(self._end)


def _free_name(path: Path) -> Path:
    names = (Path(f"{path}.old{number or ''}") for number in count())
    return next(name for name in names if not name.exists())


def _parse(raw: bytes) -> dict[str, Any] | None:
    """None for what is not one whole line."""
    try:
        line = json.loads(raw) if raw.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) else None


def _open_alone(path: Path) -> BinaryIO:
    """The file at `path`, made where there is none, that no other run has. Raises StorageError when one does, OSError
    as `open`.
    """
    try:
        descriptor = open_locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        what = "another run is writing its completions there"
        raise StorageError(what, where=str(path), fix="wait for it, or name another place with --output") from error
    return os.fdopen(descriptor, "r+b")
