"""A job as steps of a few kinds: what the linear program adds up.

    prompts, longest first   |---- round 1 ----|---- round 2 ----|-- rest --|    a round fills every row
    a round                  prefill, then max_new_tokens - 1 decode steps, whose contexts grow by a token each

Decode steps are priced at two contexts, a quarter and three quarters of the way: their seconds grow nearly linearly.
Rounds are priced at their prompts' mean length.
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
    """The mean, at least 1."""


def job_parts(shape: BatchShape, workload: WorkloadShape) -> tuple[JobPart, ...]:
    """The whole job, no sequence ending before its last token."""
    return tuple(part for rounds in _rounds(shape, workload) for part in _parts(rounds, shape, workload))


def _rounds(shape: BatchShape, workload: WorkloadShape) -> Iterator[_Rounds]:
    lengths = sorted(workload.prompt_tokens, reverse=True)
    full = len(lengths) // shape.rows
    if full:
        yield _Rounds(full, shape.gpu_batch_size, shape.num_gpu_batches, _mean(lengths[: full * shape.rows]))
    if rest := lengths[full * shape.rows :]:
        batches = -(-len(rest) // shape.gpu_batch_size)
        yield _Rounds(1, -(-len(rest) // batches), batches, _mean(rest))


def _parts(rounds: _Rounds, shape: BatchShape, workload: WorkloadShape) -> Iterator[JobPart]:
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
    decode_steps = workload.max_new_tokens - 1
    for quarter in (1, 3) if decode_steps else ():
        yield part("decode", rounds.prompt_tokens + decode_steps * quarter // 4, decode_steps / 2)


def _mean(lengths: Sequence[int]) -> int:
    return max(1, round(sum(lengths) / len(lengths)))
