"""Jobs are told apart by what their completions depend on."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flexflow_engine.jobs.identity import prompts_key, tokenizer_key
from flexflow_engine.jobs.prompts import Prompt
from flexflow_engine.jobs.tokenizer import FAST_FILE, SETTINGS

TOKENS = st.lists(st.integers(0, 3), max_size=3).map(tuple)
PROMPTS = st.lists(st.builds(Prompt, st.sampled_from(["a", "a1", "b"]), TOKENS, st.none(), TOKENS), max_size=3)


@given(PROMPTS, PROMPTS)
@example([Prompt("a", (1, 2), None, (3,))], [Prompt("a", (1,), None, (2, 3))])
@example([Prompt("a", (1,), None, (2,))], [Prompt("a", (1,), None, (3,))])
@example([Prompt("a", (1,)), Prompt("b", ())], [Prompt("a", ()), Prompt("b", (1,))])
def test_prompts_have_the_same_key_where_names_prompts_and_completions_are_the_same(
    some: list[Prompt], others: list[Prompt]
) -> None:
    assert (prompts_key(some) == prompts_key(others)) == (some == others)


def test_what_is_expected_changes_no_completion() -> None:
    assert prompts_key([Prompt("a", (1,), "this")]) == prompts_key([Prompt("a", (1,), "that")])


def test_a_tokenizer_s_key_is_its_vocabulary_s_wherever_it_lies(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "same", "other")]
    for folder, text in zip(folders, ["words", "words", "other words"], strict=True):
        folder.mkdir()
        (folder / FAST_FILE).write_text(text)
    one, same, other = map(tokenizer_key, folders)
    assert one == same
    assert len({one, other, tokenizer_key(None)}) == 3


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_part_of_a_tokenizer_without_a_file_that_has_them(tmp_path: Path, name: str) -> None:
    (tmp_path / "vocab.json").write_text("words")
    before = tokenizer_key(tmp_path)
    (tmp_path / name).write_text("{}")
    assert tokenizer_key(tmp_path) != before


def test_settings_that_decode_nothing_are_none_of_a_tokenizer(tmp_path: Path) -> None:
    """The hub's chat templates change often."""
    (tmp_path / FAST_FILE).write_text("words")
    before = tokenizer_key(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert tokenizer_key(tmp_path) == before
