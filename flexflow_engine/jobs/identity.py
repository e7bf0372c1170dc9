"""What a job's completions depend on, so that a later run knows which of them are its own."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from flexflow_engine.abc.codec import Codec, with_products
from flexflow_engine.files import reporting
from flexflow_engine.jobs.prompts import Prompt
from flexflow_engine.jobs.tokenizer import decoding_files

PLAIN = "plain"
"""Of all codecs that keep every bit, compressed or not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobIdentity:
    """Jobs that are equal in this have the same completions. Tiers, budgets and policy are no part of it: they decide
    where things lie and how many sequences compute at a time.
    """

    checkpoint: Callable[[], str]
    """Gives the digest of its content, always the same; the first call may read all of it."""
    model: str
    """The plugin."""
    dtype: str
    weights: str
    """The key of their codec, and of the tables' where it is another one."""
    kv_cache: str
    """The key of its codec."""
    tokenizer: str
    """Digest of what makes text of token ids."""
    task: str
    prompts: str
    """Digest of their names and token ids, and of those to score."""

    def differences(self, found: object) -> tuple[str, ...] | None:
        """The fields in which a job is another one, found in a file as `as_json` gave it; None for what is no job.

        The checkpoint is looked at where nothing else differs.
        """
        if not isinstance(found, dict):
            return None
        differing = tuple(name for name, value in self._settings().items() if found.get(name) != value)
        return differing or (() if found.get("checkpoint") == self.checkpoint() else ("checkpoint",))

    def as_json(self) -> dict[str, str]:
        return {"checkpoint": self.checkpoint(), **self._settings()}

    def _settings(self) -> dict[str, str]:
        """All but the checkpoint: nothing has to be read to know them."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "checkpoint"}


def codecs_key(*codecs: Codec) -> str:
    """What is told of codecs in an identity."""
    return " ".join(dict.fromkeys(PLAIN if codec.keeps_bytes else with_products(codec.key, codec) for codec in codecs))


def prompts_key(prompts: Sequence[Prompt]) -> str:
    """A digest of what is asked of the model, in 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for prompt in prompts:
        sizes = len(prompt.token_ids), len(prompt.completion)
        digest.update(json.dumps([prompt.custom_id, *sizes]).encode())
        digest.update(array("q", prompt.token_ids + prompt.completion).tobytes())
    return digest.hexdigest()


def tokenizer_key(folder: Path | None) -> str:
    """A digest of what a tokenizer's folder makes text by. Raises StorageError when that can't be read."""
    digest = hashlib.sha256()
    for path in () if folder is None else decoding_files(folder):
        with reporting(path):
            digest.update(path.read_bytes() if path.is_file() else b"-")
    return digest.hexdigest()
