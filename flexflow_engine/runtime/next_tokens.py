"""Where a sequence's next token comes from: the most likely one, or the one that the job gives and wants scored.

The head runs part by part of the vocabulary, so what is known of a row after each part is kept on the compute tier, in
the regions `candidates.BATCH.NAME` of the layout, one number a row:

    values      float32   the best logit so far, NaN once one is  Greedy
    ids         int64     its token id; the lowest among equals   Greedy
    logsumexps  float32   log of the sum of exp(logit) so far     Forced
    logits      float32   the given token's logit                 Forced
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flexflow_engine.abc.step import BatchStep, NextTokens
from flexflow_engine.abc.tier import HOST
from flexflow_engine.runtime.indices import indices

ROW_DTYPES = {"values": torch.float32, "ids": torch.int64, "logsumexps": torch.float32, "logits": torch.float32}
TokenArray = NDArray[np.int64]
RowNumbers = Callable[[str], torch.Tensor]
"""The region NAME of a batch on the compute tier, one number for each of its rows."""
ReadRows = Callable[[str, NDArray[Any]], None]
"""Starts the copy of the region NAME of a batch into an array of one number a row."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """What is on its way to the host for one batch and step; whole once the task that fetched it is done."""

    token_ids: TokenArray
    next_tokens: Callable[[], NextTokens]
    """To be called once it is whole."""


class TokenSource(ABC):
    """Called from the lanes' threads; keeps nothing that a call changes."""

    @abstractmethod
    def reduce(self, logits: torch.Tensor, first_id: int, batch: BatchStep, rows: RowNumbers) -> None:
        """Take in the logits [rows, ids of this part], in the model's dtype, counted from first_id. Parts come in
        ascending order, the first at 0. The logits may be overwritten. Called from the compute lane.
        """

    @abstractmethod
    def fetch(self, batch: BatchStep, read: ReadRows) -> Fetched:
        """Start bringing the batch's next tokens to the host, after the last part. Called from the tokens lane."""


class Greedy(TokenSource):
    """The most likely token; the lowest token id among equals."""

    def reduce(self, logits: torch.Tensor, first_id: int, batch: BatchStep, rows: RowNumbers) -> None:
        best, ids = _largest(logits)
        ids += first_id
        values, tokens = rows("values"), rows("ids")
        if first_id:
            ids = torch.where(best > values, ids, tokens)
            best = torch.maximum(best, values)
        values.copy_(best)
        tokens.copy_(ids)

    def fetch(self, batch: BatchStep, read: ReadRows) -> Fetched:
        tokens, values = np.empty(len(batch.rows), np.int64), np.empty(len(batch.rows), np.float32)
        read("ids", tokens)
        read("values", values)

        def next_tokens() -> NextTokens:
            return NextTokens(tokens.tolist(), not_finite=np.flatnonzero(~np.isfinite(values)).tolist())

        return Fetched(tokens, next_tokens)


class Forced(TokenSource):
    """The job's own tokens, whatever the model would choose (teacher forcing), each with its log-probability."""

    def __init__(self, prompt_lengths: Sequence[int], completions: Sequence[TokenArray]) -> None:
        """Both by sequence; lengths in tokens."""
        self._prompt_lengths = tuple(prompt_lengths)
        self._completions = tuple(completions)

    def reduce(self, logits: torch.Tensor, first_id: int, batch: BatchStep, rows: RowNumbers) -> None:
        logits = logits.float()
        places = indices(self._given(batch) - first_id, logits.device)
        inside = (places >= 0) & (places < logits.shape[1])
        picked = logits.gather(1, places.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
        part = _logsumexp_in_place(logits)
        logsumexps, given = rows("logsumexps"), rows("logits")
        logsumexps.copy_(torch.logaddexp(logsumexps, part) if first_id else part)
        given.copy_(torch.where(inside, picked, given))

    def fetch(self, batch: BatchStep, read: ReadRows) -> Fetched:
        logits, logsumexps = (np.empty(len(batch.rows), np.float32) for _ in range(2))
        read("logits", logits)
        read("logsumexps", logsumexps)
        given = self._given(batch)

        def next_tokens() -> NextTokens:
            return NextTokens(given.tolist(), (logits.astype(np.float64) - logsumexps).tolist())

        return Fetched(given, next_tokens)

    def _given(self, batch: BatchStep) -> TokenArray:
        """Of each row, the token that follows its last position."""
        lengths = ((row.sequence, row.context + row.new_tokens) for row in batch.rows)
        return np.array([self._completions[s][end - self._prompt_lengths[s]] for s, end in lengths], np.int64)


def _largest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row the largest logit, float32, and the first id that has it, int64; NaN is larger than any."""
    if logits.device.type == HOST:
        from flexflow_engine.cpu.largest import largest_in_rows  # noqa: PLC0415  # Numba takes half a second to import

        return largest_in_rows(logits)
    highest, ids = logits.max(dim=-1)
    return highest.float(), ids


def _logsumexp_in_place(logits: torch.Tensor) -> torch.Tensor:
    """[rows, ids] -> [rows], without another tensor as large as the logits, which it overwrites."""
    largest = logits.amax(dim=-1, keepdim=True)
    return logits.sub_(largest).exp_().sum(dim=-1).log_().add_(largest[:, 0])
