"""Child processes that print one JSON document, with a time limit and under a memory cap."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

BENCHMARKS = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Done:
    """The child's answer, and the most memory that was charged to it."""

    answer: Mapping[str, Any]
    """What it printed; a JSON object."""
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class DidNotFinish:
    """The child was ended when its time was over."""

    limit_s: float

    def __str__(self) -> str:
        return f"did not finish in {self.limit_s:.0f} s"


@dataclass(frozen=True, slots=True)
class Failed:
    """The child ended by itself, without an answer."""

    status: int

    def __str__(self) -> str:
        return "was killed: out of memory" if self.status == -signal.SIGKILL else f"failed with status {self.status}"


Outcome = Done | DidNotFinish | Failed


class Cap(Protocol):
    """On what one command may take."""

    @property
    def peak_bytes(self) -> int:
        """The most that it took, once it has ended."""

    def wrap(self, command: Sequence[str]) -> list[str]:
        """The command, which begins with the interpreter, under the cap."""


def run_capped(command: Sequence[str], cap: AbstractContextManager[Cap], *, limit_s: float) -> Outcome:
    """Run `python COMMAND…` under a cap; its standard error goes through."""
    with cap as entered:
        process = _start(entered.wrap([sys.executable, *command]))
        try:
            output, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            return DidNotFinish(limit_s)
        finally:
            _end(process)
        return Done(json.loads(output), entered.peak_bytes) if process.returncode == 0 else Failed(process.returncode)


def run_free(command: Sequence[str]) -> Mapping[str, Any]:
    """Run `python COMMAND…` without a cap. Raises CalledProcessError when it fails."""
    process = _start([sys.executable, *command])
    try:
        output, _ = process.communicate()
    finally:
        _end(process)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, list(command))
    answer: Mapping[str, Any] = json.loads(output) if output.strip() else {}
    return answer


def say(message: str) -> None:
    """A line of progress."""
    print(f"[{time.strftime('%H:%M:%S')}] {message}", file=sys.stderr, flush=True)


def _start(command: Sequence[str]) -> subprocess.Popen[str]:
    paths = [str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)


def _end(process: subprocess.Popen[str]) -> None:
    """With the processes that it started, which hold its output open; communicate() then closes that."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
