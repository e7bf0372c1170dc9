"""What a job's completions say of the model, counted line by line: exact match and perplexity."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ExactMatch:
    """How many completions are the expected text, of those whose prompt line knows it."""

    matched: int
    total: int


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How probable the scored tokens were, all lines together."""

    tokens: int
    logprob: float
    """Sum over the tokens, natural logarithms."""

    @property
    def perplexity(self) -> float | None:
        """exp(-mean log-probability); None where that is no finite number."""
        try:
            perplexity = math.exp(-self.logprob / self.tokens)
        except OverflowError:
            return None
        return perplexity if math.isfinite(perplexity) else None


class Answers:
    """Changing state: the completions that are what was expected, those compared; the tokens scored, the sum of their
    log-probabilities.
    """

    def __init__(self) -> None:
        self._matched = self._compared = self._scored = 0
        self._logprob = 0.0

    @property
    def exact_match(self) -> ExactMatch | None:
        """None when no prompt said what was expected, or there is no text to compare."""
        return ExactMatch(self._matched, self._compared) if self._compared else None

    @property
    def likelihood(self) -> Likelihood | None:
        """None when no token was scored."""
        return Likelihood(self._scored, self._logprob) if self._scored else None

    def count(self, line: Mapping[str, Any], expected: str | None) -> None:
        """Take a completion's line, and what its prompt expected."""
        text, logprobs = line.get("text"), line.get("token_logprobs", ())
        if expected is not None and text is not None:
            self._compared += 1
            self._matched += text.strip() == expected.strip()
        self._scored += len(logprobs)
        self._logprob += sum(math.nan if logprob is None else logprob for logprob in logprobs)

    def metrics(self) -> dict[str, Any]:
        """Those of a run's metrics that speak of what the model said, not of how fast."""
        found: dict[str, Any] = {}
        if (match := self.exact_match) is not None:
            found["exact_match"] = {"matched": match.matched, "total": match.total}
        if (likelihood := self.likelihood) is not None:
            found |= {"perplexity": likelihood.perplexity, "scored_tokens": likelihood.tokens}
        return found
