"""A job as steps of a few kinds: what the linear program adds up.

    prompts, longest first   |---- round 1 ----|---- round 2 ----|-- rest --|    a round fills every row
    a round                  prefill, then decode steps, whose contexts grow by a token each

Decode steps are priced at two contexts, a quarter and three quarters of the way: their seconds grow nearly linearly.
Rounds are priced at their prompts' mean length. A GPU batch takes new sequences when all of its have ended: a round has
as many decode steps as the longest sequence of a GPU batch, on average, in all of which its rows are full.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flexflow_engine.abc.policy import WorkloadShape
from flexflow_engine.abc.prediction import StepShape
from flexflow_engine.abc.step import Phase
from flexflow_plugins.schedulers.lp.shapes import BatchShape


@dataclass(frozen=True, slots=True)
class JobPart:
    """So many steps of one shape."""

    shape: StepShape
    steps: float


@dataclass(frozen=True, slots=True)
class _Rounds:
    count: int
    gpu_batch_size: int
    num_gpu_batches: int
    prompt_tokens: int
    """The mean."""
    decode_steps: float
    """The mean over GPU batches."""


Lengths = Sequence[tuple[int, int]]
"""(prompt tokens, new tokens) of each sequence."""


def as_admitted(workload: WorkloadShape) -> Lengths:
    """In the order in which sequences are computed."""
    return sorted(zip(workload.prompt_tokens, workload.new_tokens, strict=True), reverse=True)


def job_parts(shape: BatchShape, lengths: Lengths) -> tuple[JobPart, ...]:
    """The whole job, no sequence ending before its last token; `lengths` as they are admitted."""
    return tuple(part for rounds in _rounds(shape, lengths) for part in _parts(rounds, shape))


def _rounds(shape: BatchShape, lengths: Lengths) -> Iterator[_Rounds]:
    full = len(lengths) // shape.rows
    if full:
        yield _of_size(full, shape.gpu_batch_size, shape.num_gpu_batches, lengths[: full * shape.rows])
    if rest := lengths[full * shape.rows :]:
        batches = -(-len(rest) // shape.gpu_batch_size)
        yield _of_size(1, -(-len(rest) // batches), batches, rest)


def _of_size(count: int, gpu_batch_size: int, num_gpu_batches: int, lengths: Lengths) -> _Rounds:
    """So many rounds of these sequences."""
    starts = range(0, len(lengths), gpu_batch_size)
    longest = [max(new for _, new in lengths[start : start + gpu_batch_size]) for start in starts]
    return _Rounds(
        count,
        gpu_batch_size,
        num_gpu_batches,
        prompt_tokens=round(sum(prompt for prompt, _ in lengths) / len(lengths)),
        decode_steps=sum(longest) / len(longest) - 1,
    )


def _parts(rounds: _Rounds, shape: BatchShape) -> Iterator[JobPart]:
    def part(phase: Phase, context: int, steps: float) -> JobPart:
        return JobPart(
            StepShape(
                phase=phase,
                gpu_batch_size=rounds.gpu_batch_size,
                num_gpu_batches=rounds.num_gpu_batches,
                context=context,
                attention=shape.attention,
                kv_page_tokens=shape.kv_page_tokens,
            ),
            rounds.count * steps,
        )

    yield part("prefill", rounds.prompt_tokens, 1)
    for quarter in (1, 3) if rounds.decode_steps else ():
        context = rounds.prompt_tokens + int(rounds.decode_steps) * quarter // 4
        yield part("decode", context, rounds.decode_steps / 2)
