"""Which sequences compute in which step.

Sequences wait in admission order: longest prompt first, then most new tokens, ties in input order. Each gpu batch has
rows; when all the sequences of its rows are known to have ended, it takes the next ones, and prefills while the others
decode.

A step is composed before the tokens of the step before it are known. What is known is a matter of step numbers and
not of time: step s sees the tokens of steps up to s - LAG, accepted early or not, so that the same job has the same
steps whoever runs it.

    step            0         1         2         3
    row a, EOS:     .         EOS       surplus   -          the surplus token is dropped by `accept`
    row b, length:  .         .         last      -          the count needs no token: known at once

Constant: the prompts' lengths, how many tokens may follow each, the EOS ids. Changing:
    _waiting        sequences not admitted yet, in admission order
    _rows           gpu batch -> row -> the sequence's number
    _composed       sequence -> tokens composed so far, surplus included
    _tokens         sequence -> tokens accepted so far, EOS and surplus left out
    _logprobs       sequence -> their log-probabilities, where tokens are scored
    _ended_at       sequence -> step whose token was its EOS
    _generated      tokens accepted so far, over all sequences
    _finished       sequences whose last token was accepted
    _refused        what is wrong with the first token that means nothing
    _outstanding    steps composed and not accepted, oldest first
    _next_index     number of the next step
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from flexflow_engine.abc.step import BatchStep, NextTokens, RowStep, Step
from flexflow_engine.errors import NotFiniteError

FinishReason = Literal["stop", "length"]

LAG = 2
"""Step s is composed from the tokens of step s - 2 and before; those of s - 1 are still being computed."""


@dataclass(frozen=True, slots=True)
class FinishedSequence:
    """A sequence that has all its tokens."""

    sequence: int
    token_ids: tuple[int, ...]
    """Generated ids, EOS not among them; or the given ones."""
    finish_reason: FinishReason
    logprobs: tuple[float, ...] = ()
    """Natural logarithm of each token's probability, where tokens are scored."""


class Batcher:
    """Composes a job's steps and collects their tokens; single-threaded, plain Python."""

    def __init__(
        self,
        prompt_lengths: Sequence[int],
        *,
        max_new_tokens: Sequence[int],
        eos_token_ids: Collection[int],
        gpu_batch_size: int,
        num_gpu_batches: int,
    ) -> None:
        """max_new_tokens: of each sequence. eos_token_ids: empty where EOS is to be ignored."""
        assert min(gpu_batch_size, num_gpu_batches, *max_new_tokens, *prompt_lengths) > 0
        self._prompt_lengths = tuple(prompt_lengths)
        self._max_new_tokens = tuple(max_new_tokens)
        self._eos_token_ids = frozenset(eos_token_ids)
        self._gpu_batch_size = gpu_batch_size
        lengths = list(zip(prompt_lengths, max_new_tokens, strict=True))
        self._waiting = deque(sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True))
        self._rows: list[tuple[int, ...]] = [() for _ in range(num_gpu_batches)]
        self._composed = [0] * len(prompt_lengths)
        self._tokens: list[list[int]] = [[] for _ in prompt_lengths]
        self._logprobs: list[list[float]] = [[] for _ in prompt_lengths]
        self._generated = 0
        self._ended_at: dict[int, int] = {}
        self._finished: set[int] = set()
        self._refused: NotFiniteError | None = None
        self._outstanding: deque[Step] = deque()
        self._next_index = 0

    @property
    def done(self) -> bool:
        """Whether every sequence has its tokens and no composed step is left to accept."""
        return len(self._finished) == len(self._prompt_lengths) and not self._outstanding

    @property
    def generated_tokens(self) -> int:
        """Tokens accepted so far, over all sequences; EOS and surplus are not counted."""
        return self._generated

    @property
    def finished_sequences(self) -> int:
        return len(self._finished)

    def next_step(self) -> Step | None:
        """The next step, or None when there is nothing (left) to compose; then accept what is outstanding.

        At most one composed step may be outstanding when it is called. Raises NotFiniteError where an accepted step had
        a token that means nothing, of a sequence that had not ended.
        """
        assert len(self._outstanding) < LAG, "accept the oldest step first"
        if self._refused:
            raise self._refused
        if len(self._finished) == len(self._prompt_lengths):
            return None
        batches = tuple(batch for k in range(len(self._rows)) if (batch := self._compose(k)).rows)
        if not batches:
            return None
        step = Step(self._next_index, batches)
        self._next_index += 1
        self._outstanding.append(step)
        return step

    def accept(self, step_index: int, tokens: Mapping[int, NextTokens]) -> list[FinishedSequence]:
        """Take the next tokens of the oldest outstanding step, by gpu batch.

        Returns the sequences that ended with this step, in the order of gpu batch and row. A token that means nothing
        is dropped, and told by `next_step`: what ended beside it is not to be lost.
        """
        step = self._outstanding.popleft()
        assert step.index == step_index, "steps are accepted in their order"
        finished = []
        for batch in step.batches:
            found = tokens[batch.gpu_batch]
            for row, logprob in zip(batch.rows, found.logprobs, strict=False):  # none where tokens are not scored
                self._logprobs[row.sequence].append(logprob)
            for place, (row, token) in enumerate(zip(batch.rows, found.token_ids, strict=True)):
                if place in found.not_finite:
                    self._refuse(step_index, row.sequence)
                else:
                    finished += self._accept_token(step_index, row.sequence, token)
        return finished

    def _compose(self, gpu_batch: int) -> BatchStep:
        live = [(row, s) for row, s in enumerate(self._rows[gpu_batch]) if not self._known_ended(s)]
        if not live:
            live = list(enumerate(self._admit(gpu_batch)))
        return BatchStep(gpu_batch, tuple(self._compose_row(row, sequence) for row, sequence in live))

    def _admit(self, gpu_batch: int) -> tuple[int, ...]:
        count = min(self._gpu_batch_size, len(self._waiting))
        self._rows[gpu_batch] = tuple(self._waiting.popleft() for _ in range(count))
        return self._rows[gpu_batch]

    def _compose_row(self, row: int, sequence: int) -> RowStep:
        composed, prompt = self._composed[sequence], self._prompt_lengths[sequence]
        self._composed[sequence] += 1
        if not composed:
            return RowStep(row=row, sequence=sequence, new_tokens=prompt, context=0)
        return RowStep(row=row, sequence=sequence, new_tokens=1, context=prompt + composed - 1)

    def _known_ended(self, sequence: int) -> bool:
        at_length = self._composed[sequence] == self._max_new_tokens[sequence]
        return at_length or self._ended_at.get(sequence, self._next_index) <= self._next_index - LAG

    def _accept_token(self, step_index: int, sequence: int, token: int) -> list[FinishedSequence]:
        if sequence in self._finished:
            return []
        if token in self._eos_token_ids:
            self._ended_at[sequence] = step_index
            return [self._finish(sequence, "stop")]
        self._tokens[sequence].append(token)
        self._generated += 1
        at_length = len(self._tokens[sequence]) == self._max_new_tokens[sequence]
        return [self._finish(sequence, "length")] if at_length else []

    def _refuse(self, step_index: int, sequence: int) -> None:
        if sequence not in self._finished and not self._refused:
            token = len(self._tokens[sequence]) + 1
            self._refused = NotFiniteError(
                f"step {step_index}: the model's logits for token {token} are no finite numbers",
                sequence=sequence,
                fix="if float16 is too narrow, `dtype: bfloat16` or float32 would do; else look at the checkpoint",
            )

    def _finish(self, sequence: int, reason: FinishReason) -> FinishedSequence:
        self._finished.add(sequence)
        return FinishedSequence(sequence, tuple(self._tokens[sequence]), reason, tuple(self._logprobs[sequence]))
