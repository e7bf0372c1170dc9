"""One line of a prompt file, checked by itself: what can be said of it without a tokenizer or a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails

from flexflow_engine.abc.near_miss import near_miss
from flexflow_engine.errors import PromptError

OF_OPENAI = frozenset({"url", "body"})
"""Keys that a request of OpenAI's batch API has."""


class PromptLine(BaseModel):
    """`{"custom_id"?, "prompt" or "prompt_token_ids", "completion" or "completion_token_ids" or neither, "expected"?}`;
    null means the same as leaving a key out.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    custom_id: str | None = None
    prompt: str | None = None
    prompt_token_ids: list[int] | None = None
    completion: str | None = None
    completion_token_ids: list[int] | None = None
    expected: str | None = None

    @classmethod
    def parse(cls, line: bytes) -> Self:
        """Raises PromptError with everything that is wrong with the line."""
        document = _parse_json(line)
        if not isinstance(document, dict):
            raise PromptError("a line is a JSON object", fix='write {"prompt": "…"}')
        if document.keys() >= OF_OPENAI:
            raise PromptError("this is a line of an OpenAI batch", fix='write {"custom_id": "…", "prompt": "…"}')
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            raise PromptError("; ".join(map(_sentence, error.errors()))) from error

    @model_validator(mode="after")
    def _has_one_prompt(self) -> Self:
        if (self.prompt is None) == (self.prompt_token_ids is None):
            given = "neither `prompt` nor" if self.prompt is None else "both `prompt` and"
            raise ValueError(f"{given} `prompt_token_ids` given, exactly one is needed")
        if not (self.prompt or self.prompt_token_ids):
            raise ValueError("the prompt is empty")
        return self

    @model_validator(mode="after")
    def _has_one_completion_at_most(self) -> Self:
        if self.completion is not None and self.completion_token_ids is not None:
            raise ValueError("both `completion` and `completion_token_ids` given, one at most can be used")
        return self


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines with their numbers, from 1, without the blank ones at the end. Raises PromptError when unreadable."""
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise PromptError(f"the prompts can't be read ({error.strerror})", where=str(path)) from error
    while lines and not lines[-1].strip():
        lines.pop()
    return iter(enumerate(lines, start=1))


def _parse_json(line: bytes) -> Any:
    if not line.strip():
        raise PromptError("the line is blank", fix="only the end of the file may have blank lines")
    try:
        document = json.loads(line.decode("utf-8"))
        json.dumps(document, ensure_ascii=False).encode("utf-8")  # an escaped half of a surrogate pair fails here
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise PromptError(f"not valid UTF-8 ({error.reason})") from error
    except ValueError as error:
        raise PromptError(f"not valid JSON: {error}") from error
    except RecursionError as error:
        raise PromptError("not valid JSON: too deeply nested") from error
    return document


def _sentence(details: ErrorDetails) -> str:
    key = ".".join(map(str, details["loc"]))
    if details["type"] == "extra_forbidden":
        return f"unknown key `{key}`, {near_miss(key, PromptLine.model_fields)}"
    if details["type"] == "value_error":
        return str(details["ctx"]["error"])
    wanted = details["msg"].removeprefix("Input ")
    return f"`{key}` {wanted}, not {json.dumps(details['input'], ensure_ascii=False)[:60]}"
