"""The completion file is whole, in input order, or not there."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexflow_engine.errors import StorageError
from flexflow_engine.jobs.answers import ExactMatch
from flexflow_engine.jobs.batching import FinishedSequence
from flexflow_engine.jobs.prompts import Prompt
from flexflow_engine.jobs.tokenizer import Tokenizer
from full_disk import no_room
from writers import writing


class Letters(Tokenizer):
    """Id n is the n-th letter of the alphabet, id 0 a blank."""

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(" abcdefghijklmnopqrstuvwxyz".index(letter) for letter in text)

    def encode_completion(self, text: str) -> tuple[int, ...]:
        return self.encode(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(" abcdefghijklmnopqrstuvwxyz"[token_id] for token_id in token_ids)


def prompts(*expected: str | None) -> tuple[Prompt, ...]:
    return tuple(Prompt(f"p{index}", (1, 2, 3), text) for index, text in enumerate(expected))


def journal(partial: Path) -> list[dict[str, Any]]:
    """Its completions, without the first line, which says whose they are."""
    return [json.loads(line) for line in partial.read_text().splitlines()[1:]]


def test_lines_are_those_of_the_user_surface(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with writing(path, prompts(None, None), Letters()) as writer:
        writer.add(FinishedSequence(0, (8, 9), "stop"))
        writer.add(FinishedSequence(1, (8,), "length"))
        writer.finish()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {
            "custom_id": "p0",
            "text": "hi",
            "token_ids": [8, 9],
            "finish_reason": "stop",
            "usage": {"prompt_tokens": 3, "completion_tokens": 2},
        },
        {
            "custom_id": "p1",
            "text": "h",
            "token_ids": [8],
            "finish_reason": "length",
            "usage": {"prompt_tokens": 3, "completion_tokens": 1},
        },
    ]
    assert not path.with_name("out.jsonl.partial").exists()


def test_scored_tokens_have_their_log_probabilities_and_the_job_a_perplexity(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with writing(path, prompts(None, None), Letters()) as writer:
        assert writer.answers.likelihood is None
        writer.add(FinishedSequence(0, (8, 9), "length", (math.log(0.25), math.log(0.5))))
        writer.add(FinishedSequence(1, (8,), "length", (math.log(0.125),)))
        writer.finish()
        assert writer.answers.likelihood is not None
        assert writer.answers.likelihood.tokens == 3
        assert writer.answers.likelihood.perplexity == pytest.approx(4.0)
    first, second = map(json.loads, path.read_text().splitlines())
    assert first["token_logprobs"] == pytest.approx([-1.3862943611, -0.6931471806])
    assert second["token_logprobs"] == pytest.approx([-2.0794415417])


@pytest.mark.parametrize("logprob", [float("nan"), float("-inf"), -1e6])
def test_a_likelihood_beyond_numbers_leaves_the_lines_json(tmp_path: Path, logprob: float) -> None:
    path = tmp_path / "out.jsonl"
    with writing(path, prompts(None), Letters()) as writer:
        writer.add(FinishedSequence(0, (8, 9), "length", (-1.0, logprob)))
        writer.finish()
        assert writer.answers.likelihood is not None
        assert writer.answers.likelihood.perplexity is None
    expected = logprob if math.isfinite(logprob) else None
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["token_logprobs"] == [-1.0, expected]


@given(order=st.permutations(range(6)))
def test_lines_come_in_input_order_however_sequences_end(
    tmp_path_factory: pytest.TempPathFactory, order: list[int]
) -> None:
    path = tmp_path_factory.mktemp("completions") / "out.jsonl"
    with writing(path, prompts(*[None] * 6)) as writer:
        for index in order:
            writer.add(FinishedSequence(index, (index,), "stop"))
        writer.finish()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["token_ids"] for line in lines] == [[index] for index in range(6)]
    assert {line["text"] for line in lines} == {None}


def test_a_completion_is_kept_as_soon_as_its_sequence_has_ended(tmp_path: Path) -> None:
    partial = tmp_path / "out.jsonl.partial"
    with writing(tmp_path / "out.jsonl", prompts(None, None, None)) as writer:
        assert partial.read_text() == ""
        writer.add(FinishedSequence(1, (), "stop"))
        assert [line["custom_id"] for line in journal(partial)] == ["p1"]
        writer.add(FinishedSequence(0, (), "stop"))
        assert [line["custom_id"] for line in journal(partial)] == ["p1", "p0"]


def test_leaving_before_the_end_keeps_the_partial_file_and_the_earlier_result(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("of an earlier run\n")
    with writing(path, prompts(None, None)) as writer:
        writer.add(FinishedSequence(0, (4,), "stop"))
    assert path.read_text() == "of an earlier run\n"
    assert len(journal(tmp_path / "out.jsonl.partial")) == 1


def test_an_existing_result_is_replaced_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("of an earlier run\n")
    with writing(path, prompts(None)) as writer:
        writer.add(FinishedSequence(0, (4,), "stop"))
        assert path.read_text() == "of an earlier run\n"
        writer.finish()
    assert json.loads(path.read_text())["token_ids"] == [4]


def test_exact_match_compares_stripped_text_where_it_is_expected(tmp_path: Path) -> None:
    with writing(tmp_path / "out.jsonl", prompts("hi", " hi", "ho", None), Letters()) as writer:
        assert writer.answers.exact_match is None
        for index in range(4):
            writer.add(FinishedSequence(index, (0, 8, 9), "stop"))
        assert writer.answers.exact_match == ExactMatch(matched=2, total=3)


def test_without_a_tokenizer_there_is_nothing_to_compare(tmp_path: Path) -> None:
    with writing(tmp_path / "out.jsonl", prompts("hi")) as writer:
        writer.add(FinishedSequence(0, (8, 9), "stop"))
        assert writer.answers.exact_match is None


def test_a_folder_that_does_not_exist_is_told_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"out\.jsonl: the folder .*missing is missing"):
        writing(tmp_path / "missing" / "out.jsonl", prompts(None))


@pytest.mark.parametrize("place", ["", "/dev/null"])
def test_a_folder_or_a_device_is_not_replaced(tmp_path: Path, place: str) -> None:
    with pytest.raises(StorageError, match="no regular file"):
        writing(Path(place or tmp_path), prompts(None))


def test_a_full_disk_is_told_before_the_run(tmp_path: Path) -> None:
    with no_room(), pytest.raises(StorageError, match="file too large"):
        writing(tmp_path / "out.jsonl", prompts(None))
    assert not any(tmp_path.iterdir())
