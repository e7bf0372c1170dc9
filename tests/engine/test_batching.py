"""The composition of steps, against a pretended model whose greedy tokens are known beforehand."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexflow_engine.abc.step import NextTokens, RowStep, Step
from flexflow_engine.errors import NotFiniteError
from flexflow_engine.jobs.batching import Batcher, FinishedSequence

EOS = 2


class PretendedModel:
    """Samples, for each sequence, the next id of a script; checks that the KV cache has no gap."""

    def __init__(self, prompt_lengths: list[int], scripts: list[list[int]]) -> None:
        self.prompt_lengths = prompt_lengths
        self.scripts = scripts
        self.cached = [0] * len(scripts)

    def run(self, step: Step) -> dict[int, NextTokens]:
        return {batch.gpu_batch: NextTokens([self._sample(row) for row in batch.rows]) for batch in step.batches}

    def _sample(self, row: RowStep) -> int:
        prompt = self.prompt_lengths[row.sequence]
        assert row.context == self.cached[row.sequence]
        assert row.new_tokens == (1 if row.context else prompt)
        self.cached[row.sequence] += row.new_tokens
        return self.scripts[row.sequence][self.cached[row.sequence] - prompt]


def run_job(batcher: Batcher, model: PretendedModel, depth: int) -> tuple[list[Step], list[FinishedSequence]]:
    """Drive the batcher with `depth` steps composed ahead of the oldest unaccepted one."""
    steps: list[Step] = []
    finished: list[FinishedSequence] = []
    outstanding: deque[Step] = deque()
    while not batcher.done:
        while len(outstanding) < depth and (step := batcher.next_step()) is not None:
            outstanding.append(step)
            steps.append(step)
        oldest = outstanding.popleft()
        finished += batcher.accept(oldest.index, model.run(oldest))
    assert not outstanding
    assert batcher.next_step() is None
    return steps, finished


def make(prompts: list[int], max_new_tokens: int, *, rows: int, batches: int, ignore_eos: bool = False) -> Batcher:
    eos = () if ignore_eos else (EOS,)
    return Batcher(
        prompts,
        max_new_tokens=[max_new_tokens] * len(prompts),
        eos_token_ids=eos,
        gpu_batch_size=rows,
        num_gpu_batches=batches,
    )


def greedy(script: list[int], max_new_tokens: int) -> tuple[list[int], str]:
    wanted = script[:max_new_tokens]
    return (wanted[: wanted.index(EOS)], "stop") if EOS in wanted else (wanted, "length")


@st.composite
def jobs(draw: st.DrawFn) -> tuple[list[int], list[list[int]], int]:
    max_new_tokens = draw(st.integers(1, 6))
    token = st.sampled_from([EOS, 5, 6, 7])
    sequences = draw(
        st.lists(
            st.tuples(st.integers(1, 9), st.lists(token, min_size=max_new_tokens, max_size=max_new_tokens)),
            min_size=1,
            max_size=12,
        )
    )
    return [length for length, _ in sequences], [script for _, script in sequences], max_new_tokens


@given(jobs(), st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 2]))
def test_every_sequence_gets_exactly_its_greedy_tokens(
    job: tuple[list[int], list[list[int]], int], rows: int, batches: int, depth: int
) -> None:
    prompts, scripts, max_new_tokens = job
    batcher = make(prompts, max_new_tokens, rows=rows, batches=batches)
    _, finished = run_job(batcher, PretendedModel(prompts, scripts), depth)
    got = {done.sequence: (list(done.token_ids), done.finish_reason) for done in finished}
    assert len(finished) == len(prompts)
    assert got == {s: greedy(script, max_new_tokens) for s, script in enumerate(scripts)}
    assert batcher.generated_tokens == sum(len(tokens) for tokens, _ in got.values())


@given(jobs(), st.integers(1, 4), st.integers(1, 4))
def test_the_composition_does_not_depend_on_how_early_tokens_are_accepted(
    job: tuple[list[int], list[list[int]], int], rows: int, batches: int
) -> None:
    prompts, scripts, max_new_tokens = job
    early, late = (
        run_job(make(prompts, max_new_tokens, rows=rows, batches=batches), PretendedModel(prompts, scripts), depth)[0]
        for depth in (1, 2)
    )
    assert early == late[: len(early)]
    assert len(late) - len(early) in (0, 1)  # the last surplus step is composed only when tokens come late


@given(jobs(), st.integers(1, 4), st.integers(1, 4))
def test_steps_keep_rows_within_their_gpu_batch_and_phases_apart(
    job: tuple[list[int], list[list[int]], int], rows: int, batches: int
) -> None:
    prompts, scripts, max_new_tokens = job
    batcher = make(prompts, max_new_tokens, rows=rows, batches=batches)
    steps, _ = run_job(batcher, PretendedModel(prompts, scripts), depth=2)
    for step in steps:
        assert [batch.gpu_batch for batch in step.batches] == sorted({batch.gpu_batch for batch in step.batches})
        for batch in step.batches:
            numbers = [row.row for row in batch.rows]
            assert numbers == sorted(set(numbers))
            assert 0 <= numbers[0] <= numbers[-1] < rows
            assert len({row.context == 0 for row in batch.rows}) == 1
            assert 0 <= batch.gpu_batch < batches


def test_longest_prompts_are_admitted_first_and_ties_keep_the_input_order() -> None:
    step = make([3, 9, 3, 7], 1, rows=2, batches=2).next_step()
    assert step is not None
    assert [[row.sequence for row in batch.rows] for batch in step.batches] == [[1, 3], [0, 2]]


def test_a_gpu_batch_that_ended_prefills_while_another_decodes() -> None:
    prompts, scripts = [4, 3, 2], [[5, EOS, 5, 5, 5, 5], [5, 5, 5, 5, 5, 5], [6, 6, 6, 6, 6, 6]]
    steps, _ = run_job(make(prompts, 6, rows=1, batches=2), PretendedModel(prompts, scripts), depth=2)
    mixed = [step for step in steps if {batch.phase for batch in step.batches} == {"prefill", "decode"}]
    assert [step.index for step in mixed] == [3]
    assert (mixed[0].new_tokens("prefill"), mixed[0].new_tokens("decode")) == (2, 1)


def test_a_known_length_leaves_no_surplus_and_an_eos_leaves_one() -> None:
    length, _ = run_job(make([2], 3, rows=1, batches=1), PretendedModel([2], [[5, 5, 5]]), depth=2)
    stop, _ = run_job(make([2], 5, rows=1, batches=1), PretendedModel([2], [[5, EOS, 5, 5, 5]]), depth=2)
    assert (len(length), len(stop)) == (3, 3)


def test_ignoring_eos_generates_every_token() -> None:
    batcher = make([2], 3, rows=1, batches=1, ignore_eos=True)
    _, finished = run_job(batcher, PretendedModel([2], [[EOS, EOS, 7]]), depth=2)
    assert finished == [FinishedSequence(0, (EOS, EOS, 7), "length")]


def test_a_step_cannot_be_composed_past_the_lag() -> None:
    batcher = make([2], 9, rows=1, batches=1)
    assert batcher.next_step()
    assert batcher.next_step()
    with pytest.raises(AssertionError, match="accept the oldest step"):
        batcher.next_step()


def with_one_of_two_ended() -> Batcher:
    """Prompt 1, in the second place, has ended, and the step that computes its surplus token is outstanding."""
    batcher = make([3, 4], 3, rows=2, batches=1)
    assert batcher.next_step()
    assert batcher.next_step()
    assert [ended.sequence for ended in batcher.accept(0, {0: NextTokens([5, EOS])})] == [0]
    return batcher


def test_a_token_that_means_nothing_is_refused() -> None:
    batcher = with_one_of_two_ended()
    assert batcher.accept(1, {0: NextTokens([5, 5], not_finite=[0])}) == []
    with pytest.raises(NotFiniteError, match=r"sequence 1: step 1: .* token 2 are no finite numbers"):
        batcher.next_step()


def test_what_ended_in_the_same_step_is_handed_out_and_the_first_refusal_told() -> None:
    batcher = make([4, 3, 2], 1, rows=3, batches=1)
    assert batcher.next_step()
    assert batcher.accept(0, {0: NextTokens([5, 6, 7], not_finite=[0, 2])}) == [FinishedSequence(1, (6,), "length")]
    with pytest.raises(NotFiniteError, match="sequence 0: step 0"):
        batcher.next_step()


def test_a_surplus_token_that_means_nothing_is_dropped() -> None:
    assert with_one_of_two_ended().accept(1, {0: NextTokens([5, 5], not_finite=[1])}) == []
