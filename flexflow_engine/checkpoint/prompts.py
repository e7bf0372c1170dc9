"""A job's prompts, with the tokenizer that its checkpoint has for them."""

from __future__ import annotations

from pathlib import Path

from flexflow_engine.checkpoint.checkpoint import Checkpoint
from flexflow_engine.errors import CheckpointError, ProblemsError
from flexflow_engine.jobs.prompts import Prompt, load_prompts
from flexflow_engine.jobs.recipe import Workload
from flexflow_engine.jobs.tokenizer import Tokenizer, load_tokenizer


def open_prompts(
    checkpoint: Checkpoint, workload: Workload
) -> tuple[Path | None, Tokenizer | None, tuple[Prompt, ...]]:
    """With the tokenizer's folder. A job whose prompts are token ids needs no tokenizer: that the hub does not give one
    is told with what is wrong with prompts, and not by itself. Raises ProblemsError, PromptError, CheckpointError.
    """
    folder, unfetched = _folder(checkpoint)
    tokenizer = load_tokenizer(folder)
    try:
        return folder, tokenizer, load_prompts(workload, tokenizer, checkpoint.model.config)
    except ProblemsError as error:
        raise ProblemsError([*error.problems, *unfetched]) from error


def _folder(checkpoint: Checkpoint) -> tuple[Path | None, list[CheckpointError]]:
    """The tokenizer's, and why it can't be had."""
    try:
        return checkpoint.tokenizer_folder, []
    except CheckpointError as error:
        return None, [error]
