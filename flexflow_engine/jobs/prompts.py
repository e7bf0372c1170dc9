"""The prompts of a job as token ids: read from JSON lines, or made up."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flexflow_engine.abc.model import ModelConfig
from flexflow_engine.errors import ProblemsError, PromptError
from flexflow_engine.jobs.prompt_lines import PromptLine, numbered_lines
from flexflow_engine.jobs.recipe import SyntheticPrompts, Workload
from flexflow_engine.jobs.tokenizer import Tokenizer

MAX_SHOWN = 20
"""Problems of one prompt file that are told one by one; the rest is counted."""

FIRST_ORDINARY_ID = 4
"""Most vocabularies begin with BOS, padding, EOS and unknown."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One sequence to continue."""

    custom_id: str
    token_ids: tuple[int, ...]
    expected: str | None = None
    """The right answer, where the prompt file knows it."""


def load_prompts(workload: Workload, tokenizer: Tokenizer | None, config: ModelConfig) -> tuple[Prompt, ...]:
    """The recipe's prompts in input order. Raises ProblemsError or PromptError."""
    if isinstance(workload.prompts, SyntheticPrompts):
        return synthetic_prompts(workload.prompts, config, workload.max_new_tokens)
    return read_prompts(workload.prompts, tokenizer, config, workload.max_new_tokens)


def read_prompts(
    path: Path, tokenizer: Tokenizer | None, config: ModelConfig, max_new_tokens: int
) -> tuple[Prompt, ...]:
    """The prompts of a JSON lines file. Raises ProblemsError telling the unusable lines by their numbers."""
    lines: dict[int, PromptLine] = {}
    token_ids: dict[int, tuple[int, ...]] = {}
    problems: list[PromptError] = []
    first_lines: dict[str, int] = {}
    try:
        numbered = numbered_lines(path)
    except PromptError as error:
        raise ProblemsError([error]) from error
    for number, raw in numbered:
        try:
            lines[number] = PromptLine.parse(raw)
            _check_unique(lines[number].custom_id, number, first_lines)
            token_ids[number] = _token_ids(lines[number], tokenizer, config, max_new_tokens)
        except PromptError as error:
            problems.append(PromptError(error.what, where=f"{path}, line {number}", fix=error.fix))
    if not lines and not problems:
        problems.append(PromptError("the prompt file is empty", where=str(path)))
    if problems:
        raise ProblemsError([*_shown(problems, path)])
    names = _custom_ids(lines)
    return tuple(Prompt(names[number], token_ids[number], line.expected) for number, line in lines.items())


def synthetic_prompts(synthetic: SyntheticPrompts, config: ModelConfig, max_new_tokens: int) -> tuple[Prompt, ...]:
    """Seeded random token ids of one length. Raises PromptError when the model has too few positions."""
    _check_length(synthetic.prompt_tokens, config, max_new_tokens)
    generator = random.Random(synthetic.seed)
    ordinary = range(min(FIRST_ORDINARY_ID, config.vocab_size - 1), config.vocab_size)
    return tuple(
        Prompt(f"synthetic-{index}", tuple(generator.choices(ordinary, k=synthetic.prompt_tokens)))
        for index in range(1, synthetic.count + 1)
    )


def _token_ids(
    line: PromptLine, tokenizer: Tokenizer | None, config: ModelConfig, max_new_tokens: int
) -> tuple[int, ...]:
    token_ids = _encode(line, tokenizer)
    _check_vocabulary(token_ids, config)
    _check_length(len(token_ids), config, max_new_tokens)
    return token_ids


def _encode(line: PromptLine, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    if line.prompt is None:
        return tuple(line.prompt_token_ids or ())
    if tokenizer is None:
        raise PromptError("the checkpoint has no tokenizer for a text prompt", fix="give `prompt_token_ids`")
    token_ids = tokenizer.encode(line.prompt)
    if not token_ids:
        raise PromptError("the prompt is empty: the tokenizer makes no token of it")
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


def _shown(problems: list[PromptError], path: Path) -> list[PromptError]:
    if len(problems) <= MAX_SHOWN:
        return problems
    rest = len(problems) - MAX_SHOWN
    return [*problems[:MAX_SHOWN], PromptError(f"{rest} more lines can't be used", where=str(path))]
