"""Child processes that print one JSON document, with a time limit and under a memory cap."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from throughput.gpu_cap import gpu_memory_cap
from throughput.memory_cap import memory_cap

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


def run_capped(command: Sequence[str], *, cap_nbytes: int, limit_s: float, gpu: bool = False) -> Outcome:
    """Run `python COMMAND…` under a cap, of the process's memory or of what it may take of a GPU's; its standard error
    goes through.
    """
    with (gpu_memory_cap if gpu else memory_cap)(cap_nbytes) as cap:
        process = _start(cap.wrap([sys.executable, *command]))
        try:
            output, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            return DidNotFinish(limit_s)
        finally:
            _end(process)
        return Done(json.loads(output), cap.peak_bytes) if process.returncode == 0 else Failed(process.returncode)


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
