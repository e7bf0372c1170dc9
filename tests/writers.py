"""A job whose completions are written without running it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flexflow_engine.jobs.completions import CompletionWriter
from flexflow_engine.jobs.identity import JobIdentity
from flexflow_engine.jobs.prompts import Prompt
from flexflow_engine.jobs.tokenizer import Tokenizer

JOB = JobIdentity(
    checkpoint=lambda: "c",
    model="opt",
    dtype="float32",
    weights="plain",
    kv_cache="plain",
    tokenizer="t",
    task="t",
    prompts="p",
)


def writing(
    path: Path,
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer | None = None,
    *,
    job: JobIdentity = JOB,
    told: list[str] | None = None,
    fresh: bool = False,
) -> CompletionWriter:
    """told: gets what is told of an earlier run."""
    tell = ([] if told is None else told).append
    return CompletionWriter(path, prompts, tokenizer, identity=job, tell=tell, fresh=fresh)
