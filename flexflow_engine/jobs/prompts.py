"""The prompts of a job as token ids: read from JSON lines, or made up."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flexflow_engine.abc.model import ModelConfig
from flexflow_engine.errors import ProblemsError, PromptError
from flexflow_engine.jobs.prompt_lines import PromptLine, numbered_lines
from flexflow_engine.jobs.prompt_problems import by_problem
from flexflow_engine.jobs.recipe import Generate, Score, SyntheticPrompts, Workload
from flexflow_engine.jobs.tokenizer import Tokenizer

TokenIds = tuple[int, ...]

FIRST_ORDINARY_ID = 4
"""Most vocabularies begin with BOS, padding, EOS and unknown."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One sequence to continue, or to score the given completion of."""

    custom_id: str
    token_ids: tuple[int, ...]
    expected: str | None = None
    """The right answer, where the prompt file knows it and the model is asked for it."""
    completion: tuple[int, ...] = ()
    """The token ids to score; empty in a job that generates."""


def load_prompts(workload: Workload, tokenizer: Tokenizer | None, config: ModelConfig) -> tuple[Prompt, ...]:
    """The recipe's prompts in input order. Raises ProblemsError or PromptError."""
    if isinstance(workload.prompts, SyntheticPrompts):
        assert isinstance(workload.task, Generate), "a recipe that scores synthetic prompts is refused"
        return synthetic_prompts(workload.prompts, config, workload.task.max_new_tokens)
    return read_prompts(workload.prompts, tokenizer, config, workload.task)


def read_prompts(
    path: Path, tokenizer: Tokenizer | None, config: ModelConfig, task: Generate | Score
) -> tuple[Prompt, ...]:
    """The prompts of a JSON lines file. Raises ProblemsError: what is wrong, and in which lines."""
    lines: dict[int, PromptLine] = {}
    tokens: dict[int, tuple[TokenIds, TokenIds]] = {}
    problems: dict[int, PromptError] = {}
    first_lines: dict[str, int] = {}
    try:
        numbered = numbered_lines(path)
    except PromptError as error:
        raise ProblemsError([error]) from error
    for number, raw in numbered:
        try:
            lines[number] = PromptLine.parse(raw)
            _check_unique(lines[number].custom_id, number, first_lines)
            tokens[number] = _tokens(lines[number], tokenizer, config, task)
        except PromptError as error:
            problems[number] = error
    if problems:
        raise ProblemsError(list(by_problem(problems, path)))
    if not lines:
        raise ProblemsError([PromptError("the prompt file is empty", where=str(path))])
    names = _custom_ids(lines)
    return tuple(_prompt(names[number], line, *tokens[number], task) for number, line in lines.items())


def synthetic_prompts(synthetic: SyntheticPrompts, config: ModelConfig, max_new_tokens: int) -> tuple[Prompt, ...]:
    """Seeded random token ids of one length. Raises PromptError when the model has too few positions."""
    _check_length(synthetic.prompt_tokens, config, max_new_tokens)
    generator = random.Random(synthetic.seed)
    ordinary = range(min(FIRST_ORDINARY_ID, config.vocab_size - 1), config.vocab_size)
    return tuple(
        Prompt(f"synthetic-{index}", tuple(generator.choices(ordinary, k=synthetic.prompt_tokens)))
        for index in range(1, synthetic.count + 1)
    )


def _tokens(
    line: PromptLine, tokenizer: Tokenizer | None, config: ModelConfig, task: Generate | Score
) -> tuple[TokenIds, TokenIds]:
    """Token ids of the prompt and, where it is to be scored, of the completion."""
    token_ids = _encode(line, tokenizer)
    _check_vocabulary(token_ids, config)
    if isinstance(task, Generate):
        _check_length(len(token_ids), config, task.max_new_tokens)
        return token_ids, ()
    completion = _encode_completion(line, tokenizer)
    _check_vocabulary(completion, config)
    _check_scored_length(len(token_ids), len(completion), config)
    return token_ids, completion


def _prompt(
    custom_id: str, line: PromptLine, token_ids: TokenIds, completion: TokenIds, task: Generate | Score
) -> Prompt:
    """What is scored is given, so there is nothing to compare with what was expected."""
    return Prompt(custom_id, token_ids, line.expected if isinstance(task, Generate) else None, completion)


def _encode(line: PromptLine, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    if line.prompt is None:
        return tuple(line.prompt_token_ids or ())
    if tokenizer is None:
        raise PromptError("the checkpoint has no tokenizer for a text prompt", fix="give `prompt_token_ids`")
    token_ids = tokenizer.encode(line.prompt)
    if not token_ids:
        raise PromptError("the prompt is empty: the tokenizer makes no token of it")
    return token_ids


def _encode_completion(line: PromptLine, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    if line.completion_token_ids is not None:
        token_ids = tuple(line.completion_token_ids)
    elif line.completion is None:
        raise PromptError("the line has no completion to score", fix="give `completion` or `completion_token_ids`")
    elif tokenizer is None:
        raise PromptError("the checkpoint has no tokenizer for a text to score", fix="give `completion_token_ids`")
    else:
        token_ids = tokenizer.encode_completion(line.completion)
    if not token_ids:
        raise PromptError("the completion has no token to score")
    return token_ids


def _check_vocabulary(token_ids: Sequence[int], config: ModelConfig) -> None:
    for token_id in (min(token_ids), max(token_ids)):
        if not 0 <= token_id < config.vocab_size:
            ids = f"ids go from 0 to {config.vocab_size - 1}"
            raise PromptError(f"token id {token_id} is out of the model's vocabulary", fix=ids)


def _check_length(prompt_tokens: int, config: ModelConfig, max_new_tokens: int) -> None:
    if prompt_tokens + max_new_tokens > config.max_positions:
        asked = f"{prompt_tokens} prompt tokens and {max_new_tokens} new ones"
        room = config.max_positions - max_new_tokens
        fix = (
            f"shorten the prompt to {room} tokens"
            if room > 0
            else f"max_new_tokens must be below {config.max_positions}"
        )
        raise PromptError(f"{asked} are more than the model's {config.max_positions} positions", fix=fix)


def _check_scored_length(prompt_tokens: int, completion_tokens: int, config: ModelConfig) -> None:
    if prompt_tokens + completion_tokens > config.max_positions:
        asked = f"{prompt_tokens} prompt tokens and {completion_tokens} of the completion"
        fix = "shorten one of them, or score the text in parts"
        raise PromptError(f"{asked} are more than the model's {config.max_positions} positions", fix=fix)


def _check_unique(custom_id: str | None, number: int, first_lines: dict[str, int]) -> None:
    if custom_id is not None and (first := first_lines.setdefault(custom_id, number)) != number:
        raise PromptError(f"the custom_id {custom_id!r} is taken by line {first}")


def _custom_ids(lines: dict[int, PromptLine]) -> dict[int, str]:
    """Each line's custom_id; a line without one is called by its number, and never by another line's name."""
    taken = {line.custom_id for line in lines.values()}
    names: dict[int, str] = {}
    for number, line in lines.items():
        default = f"line-{number}"
        while default in taken:
            default += "-unnamed"
        names[number] = default if line.custom_id is None else line.custom_id
    return names
