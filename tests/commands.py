"""Recipes on disk, and the command line that runs them: in this process, or in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import yaml

from flexflow_engine.cli.app import main

Json = dict[str, Any]

TIERS: Json = {
    "device": {"plugin": "cpu", "budget": "8MiB"},
    "host": {"plugin": "pinned", "budget": "8MiB"},
    "disk": {"plugin": "zarr", "budget": "16MiB"},
}
SHARES: Json = {"device": 20, "host": 30, "disk": 50}
SCHEDULER: Json = {
    "plugin": "fixed",
    "gpu_batch_size": 2,
    "num_gpu_batches": 2,
    "weights": SHARES,
    "kv_cache": SHARES,
    "activations": SHARES,
}


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what it said."""

    status: int
    stdout: str
    stderr: str

    def assert_user_error(self) -> None:
        """Exit status 2 and readable lines, with nothing for a program on stdout."""
        assert (self.status, self.stdout) == (2, ""), self
        assert "Traceback" not in self.stderr
        assert any(line.startswith("error: ") for line in self.stderr.splitlines()), self.stderr


def write_recipe(folder: Path, checkpoint: Path | str, prompts: Sequence[Sequence[int]], **workload: Any) -> Path:
    """A recipe over three tiers in a new `folder`, its prompts as token ids, its disk tier beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_prompts(folder, [{"prompt_token_ids": list(prompt)} for prompt in prompts])
    recipe = {
        "name": "job",
        "model": {"plugin": "opt", "checkpoint": str(checkpoint), "dtype": "float32"},
        "tiers": TIERS | {"disk": TIERS["disk"] | {"path": str(folder / "disk")}},
        "scheduler": SCHEDULER,
        "workload": {"prompts": "prompts.jsonl", "max_new_tokens": 6} | workload,
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def write_prompts(folder: Path, lines: Iterable[Mapping[str, object]]) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def save_tokenizer(folder: Path, *, vocabulary: int = 300) -> None:
    """A tokenizer.json of words `w0`, `w1`, … whose numbers are their ids; any other word is `w3`."""
    words = {f"w{index}": index for index in range(vocabulary)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


class CommandLine:
    """Runs verbs in this process: an exception that is no exit status fails the test."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, verb: str, *arguments: str | Path) -> Outcome:
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([verb, *map(str, arguments)])
        assert isinstance(left.value.code, int | None)
        return Outcome(left.value.code or 0, *self._capsys.readouterr())


def start(*arguments: str | Path, cwd: Path, **variables: str) -> subprocess.Popen[str]:
    """`python -m flexflow_engine …` in a process of its own, caches in `cwd`; the caller waits for it.

    A PYTHONPATH comes before this process's own.
    """
    paths = variables.get("PYTHONPATH"), os.environ.get("PYTHONPATH")
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cwd / "cache")} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], *, seconds: float = 60.0) -> None:
    """Wait for what a started process does; one that ends without it, or does not do it in time, fails the test."""
    give_up = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < give_up, "it did not happen"
        time.sleep(0.02)


def ended(process: subprocess.Popen[str], *, seconds: float = 120.0) -> Outcome:
    """The outcome of a started process; one that does not end in time is killed, and fails the test."""
    try:
        stdout, stderr = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return Outcome(process.returncode, stdout, stderr)


def install(folder: Path, distribution: str, source: str) -> Path:
    """A folder that, on sys.path, is an installed distribution with one plugin module. Returns it."""
    site = folder / f"{distribution}-site"
    metadata = site / f"{distribution}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (site / f"{distribution}.py").write_text(source)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[flexflow_engine]\nmain = {distribution}\n")
    return site


def completions(path: Path) -> list[Json]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def kept(partial: Path) -> int:
    """How many completions a `.partial` file holds, which may have other lines, or not be there."""
    return partial.read_bytes().count(b'"custom_id"') if partial.exists() else 0


def token_ids(path: Path) -> dict[int, tuple[int, ...]]:
    """The generated ids by position in the file."""
    return {index: tuple(line["token_ids"]) for index, line in enumerate(completions(path))}
