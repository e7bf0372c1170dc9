"""What a recipe asks for, found and read, before it is planned how to compute it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np

from flexflow_engine.abc.model import Model
from flexflow_engine.abc.policy import WorkloadShape
from flexflow_engine.checkpoint.checkpoint import ByteProgress, Checkpoint
from flexflow_engine.checkpoint.prompts import open_prompts
from flexflow_engine.jobs.identity import JobIdentity, codecs_key, prompts_key, tokenizer_key
from flexflow_engine.jobs.prompts import Prompt
from flexflow_engine.jobs.recipe import Generate, Recipe, Score
from flexflow_engine.jobs.tokenizer import Tokenizer
from flexflow_engine.planning.plan import Codecs
from flexflow_engine.runtime.next_tokens import Forced, Greedy, TokenArray, TokenSource


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A recipe with its checkpoint's configuration, its codecs and its prompts as token ids."""

    recipe: Recipe
    checkpoint: Checkpoint
    codecs: Codecs
    tokenizer_folder: Path | None
    tokenizer: Tokenizer | None
    prompts: tuple[Prompt, ...]
    """Of a job that goes on where it stopped, those that are left to compute."""

    @classmethod
    def read(cls, recipe: Recipe, checkpoint: Checkpoint, codecs: Codecs) -> Asked:
        """With the recipe's prompts as token ids. Raises ProblemsError, PromptError or CheckpointError."""
        folder, tokenizer, prompts = open_prompts(checkpoint, recipe.workload)
        return cls(
            recipe=recipe,
            checkpoint=checkpoint,
            codecs=codecs,
            tokenizer_folder=folder,
            tokenizer=tokenizer,
            prompts=prompts,
        )

    @property
    def model(self) -> Model:
        return self.checkpoint.model

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Those that end a sequence of this job."""
        task = self.recipe.workload.task
        return () if isinstance(task, Score) or task.ignore_eos else self.model.config.eos_token_ids

    def shape(self) -> WorkloadShape:
        return WorkloadShape(
            tuple(len(prompt.token_ids) for prompt in self.prompts),
            tuple(_new_tokens(prompt, self.recipe.workload.task) for prompt in self.prompts),
        )

    def arrays(self) -> list[TokenArray]:
        """Each prompt's token ids."""
        return [_array(prompt.token_ids) for prompt in self.prompts]

    def source(self) -> TokenSource:
        """Of the tokens that follow the prompts."""
        if isinstance(self.recipe.workload.task, Generate):
            return Greedy()
        completions = [_array(prompt.completion) for prompt in self.prompts]
        return Forced([len(prompt.token_ids) for prompt in self.prompts], completions)

    def identity(self, reading: ByteProgress) -> JobIdentity:
        """What the completions depend on. reading: called as the checkpoint's files are read to know their content,
        when that is asked for.
        """
        model, task = self.recipe.model, self.recipe.workload.task
        ends = f"generate {task.max_new_tokens} {self.eos_token_ids}" if isinstance(task, Generate) else "score"
        return JobIdentity(
            checkpoint=cache(partial(self.checkpoint.content_key, reading)),
            model=model.plugin,
            dtype=model.dtype,
            weights=codecs_key(self.codecs.weights, self.codecs.weights.for_table()),
            kv_cache=codecs_key(self.codecs.kv_cache),
            tokenizer=tokenizer_key(self.tokenizer_folder),
            task=ends,
            prompts=prompts_key(self.prompts),
        )


def _new_tokens(prompt: Prompt, task: Generate | Score) -> int:
    return task.max_new_tokens if isinstance(task, Generate) else len(prompt.completion)


def _array(token_ids: Sequence[int]) -> TokenArray:
    return np.asarray(token_ids, np.int64)
