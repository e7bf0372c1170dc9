"""Prompt lines become token ids, or a list of what is wrong with which line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from flexflow_engine.abc.model import ModelConfig
from flexflow_engine.errors import CheckpointError, ProblemsError, PromptError
from flexflow_engine.jobs.prompts import Prompt, load_prompts, read_prompts, synthetic_prompts
from flexflow_engine.jobs.recipe import Generate, Score, SyntheticPrompts, Workload
from flexflow_engine.jobs.tokenizer import FastTokenizer, Tokenizer, TransformersTokenizer, load_tokenizer

BOS = 2
GENERATE = Generate(max_new_tokens=4, ignore_eos=True)
CONFIG = ModelConfig(
    model_type="opt",
    num_layers=1,
    hidden_size=8,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    vocab_size=280,
    max_positions=16,
    attention_scale=1.0,
    eos_token_ids=(2,),
)


@pytest.fixture(scope="module")
def backend() -> tokenizers.Tokenizer:
    """A byte-level BPE whose ids 0 to 3 are OPT's special tokens."""
    built = tokenizers.Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    built.train_from_iterator(["the name of the town is written here"] * 4, trainer)
    return built


@pytest.fixture
def tokenizer(backend: tokenizers.Tokenizer, tmp_path: Path) -> Tokenizer:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    with_bos = tokenizers.Tokenizer.from_str(backend.to_str())
    with_bos.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", BOS)])
    with_bos.enable_truncation(3)
    with_bos.save(str(folder / "tokenizer.json"))
    loaded = load_tokenizer(folder)
    assert isinstance(loaded, FastTokenizer)
    return loaded


def write(tmp_path: Path, *lines: Any) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def read(path: Path, tokenizer: Tokenizer | None = None) -> tuple[Prompt, ...]:
    return read_prompts(path, tokenizer, CONFIG, GENERATE)


def problems_of(path: Path, tokenizer: Tokenizer | None = None) -> list[str]:
    with pytest.raises(ProblemsError) as caught:
        read(path, tokenizer)
    return [str(problem).replace(str(path), "FILE") for problem in caught.value.problems]


def test_both_kinds_of_lines_are_read_in_input_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(
        tmp_path,
        {"custom_id": "b", "prompt": "town", "expected": "x"},
        {"custom_id": "a", "prompt_token_ids": [5, 6]},
        {"prompt_token_ids": [7], "custom_id": None},
    )
    first, second, third = read(path, tokenizer)
    assert (first.custom_id, first.token_ids[0], first.expected) == ("b", BOS, "x")
    assert second == Prompt("a", (5, 6))
    assert third == Prompt("line-3", (7,))


def test_blank_lines_at_the_end_windows_line_ends_and_a_byte_order_mark_are_no_matter(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt_token_ids": [5]}\r\n{"prompt_token_ids": [6]}\r\n\r\n  \n\n')
    assert [prompt.token_ids for prompt in read(path)] == [(5,), (6,)]


def test_a_problem_that_lines_share_is_told_once(tmp_path: Path) -> None:
    good, bad = {"prompt_token_ids": [5]}, {"prompt": "town"}
    path = write(tmp_path, *[bad] * 600, good, {}, bad, good, bad, good, bad, good, bad, bad)
    assert problems_of(path) == [
        "FILE, lines 1 to 600, 603, 605, 607 and 2 more: the checkpoint has no tokenizer for a text prompt; give "
        "`prompt_token_ids`",
        "FILE, line 602: neither `prompt` nor `prompt_token_ids` given, exactly one is needed",
    ]


def test_a_default_name_gives_way_to_a_custom_id(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt_token_ids": [5]}, {"prompt_token_ids": [5], "custom_id": "line-1"})
    names = [prompt.custom_id for prompt in read(path)]
    assert names[1] == "line-1"
    assert len(set(names)) == 2


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not valid JSON"),
        ("", "the line is blank"),
        ("[1]", "a line is a JSON object"),
        (
            {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}},
            'this is a line of an OpenAI batch; write {"custom_id": "…", "prompt": "…"}',
        ),
        ({"promt": "x"}, "unknown key `promt`, did you mean `prompt`?"),
        ({}, "neither `prompt` nor `prompt_token_ids` given"),
        ({"prompt": None}, "neither `prompt` nor `prompt_token_ids` given"),
        ({"prompt": "x", "prompt_token_ids": [5]}, "both `prompt` and `prompt_token_ids` given"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt_token_ids": []}, "the prompt is empty"),
        ({"prompt": 5}, "`prompt` should be a valid string, not 5"),
        ({"prompt_token_ids": "5"}, '`prompt_token_ids` should be a valid list, not "5"'),
        ({"prompt_token_ids": [5, True]}, "`prompt_token_ids.1` should be a valid integer, not true"),
        ({"prompt_token_ids": [1.0]}, "`prompt_token_ids.0` should be a valid integer, not 1.0"),
        ({"prompt_token_ids": [5], "custom_id": 7}, "`custom_id` should be a valid string, not 7"),
        ({"prompt_token_ids": [5], "expected": 7}, "`expected` should be a valid string, not 7"),
        ({"prompt_token_ids": [280]}, "token id 280 is out of the model's vocabulary; ids go from 0 to 279"),
        ({"prompt_token_ids": [-1]}, "token id -1 is out of the model's vocabulary"),
        (
            {"prompt_token_ids": [5] * 13},
            "13 prompt tokens and 4 new ones are more than the model's 16 positions; shorten the prompt to 12 tokens",
        ),
        ({"prompt": "town"}, "the checkpoint has no tokenizer for a text prompt; give `prompt_token_ids`"),
        ('{"prompt_token_ids": [5], "custom_id": "\\ud800"}', "not valid UTF-8"),
        ("[" * 100_000, "too deeply nested"),
    ],
)
def test_an_unusable_line_is_told_with_its_number(tmp_path: Path, line: Any, problem: str) -> None:
    path = write(tmp_path, {"prompt_token_ids": [5]}, line, {"prompt_token_ids": [5]})
    (found,) = problems_of(path)
    assert found.startswith("FILE, line 2: ")
    assert problem in found


def test_the_last_position_may_be_used(tmp_path: Path) -> None:
    assert len(read(write(tmp_path, {"prompt_token_ids": [5] * 12}))[0].token_ids) == 12


def test_invalid_utf8_is_told_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt_token_ids": [5]}\n{"prompt": "\xff"}\n')
    (found,) = problems_of(path)
    assert found.startswith("FILE, line 2: not valid UTF-8")


def test_a_custom_id_given_twice_names_both_lines(tmp_path: Path) -> None:
    line = {"custom_id": "same", "prompt_token_ids": [5]}
    assert problems_of(write(tmp_path, line, line)) == ["FILE, line 2: the custom_id 'same' is taken by line 1"]


@pytest.mark.parametrize("text", ["", "\n", " \n\n"])
def test_an_empty_file_is_told(tmp_path: Path, text: str) -> None:
    assert problems_of(write(tmp_path, text)) == ["FILE: the prompt file is empty"]


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    assert problems_of(tmp_path / "none") == ["FILE: the prompts can't be read (No such file or directory)"]


def test_every_bad_line_is_counted_and_the_first_twenty_problems_are_shown(tmp_path: Path) -> None:
    found = problems_of(write(tmp_path, *({"prompt_token_ids": [280 + n]} for n in range(25))))
    assert len(found) == 21
    assert found[-1] == "FILE: 5 more lines can't be used"


def test_a_completion_to_score_follows_its_prompt_without_special_tokens(tmp_path: Path, tokenizer: Tokenizer) -> None:
    ids = {"prompt_token_ids": [2, 7], "completion_token_ids": [9, 8, 2], "expected": "x"}
    path = write(tmp_path, {"prompt": "the", "completion": " town", "expected": " town"}, ids)
    text, given = read_prompts(path, tokenizer, CONFIG, Score())
    assert text.token_ids == tokenizer.encode("the")
    assert (BOS, *text.completion) == tokenizer.encode(" town")
    assert (given.token_ids, given.completion) == ((2, 7), (9, 8, 2))
    assert {text.expected, given.expected} == {None}, "nothing is asked, so nothing is compared"


def test_a_job_that_generates_takes_no_notice_of_completions(tmp_path: Path) -> None:
    (prompt,) = read(write(tmp_path, {"prompt_token_ids": [5], "completion_token_ids": [6]}))
    assert prompt.completion == ()


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({"prompt_token_ids": [5]}, "the line has no completion to score; give `completion` or `completion_token_ids`"),
        ({"prompt_token_ids": [5], "completion": "a"}, "no tokenizer for a text to score; give `completion_token_ids`"),
        ({"prompt_token_ids": [5], "completion_token_ids": []}, "the completion has no token to score"),
        ({"prompt_token_ids": [5], "completion_token_ids": [280]}, "token id 280 is out of the model's vocabulary"),
        (
            {"prompt_token_ids": [5] * 9, "completion_token_ids": [6] * 8},
            "9 prompt tokens and 8 of the completion are more than the model's 16 positions",
        ),
        (
            {"prompt_token_ids": [5], "completion": "a", "completion_token_ids": [6]},
            "both `completion` and `completion_token_ids` given",
        ),
    ],
)
def test_a_line_that_can_t_be_scored_is_told_with_its_number(tmp_path: Path, line: Any, problem: str) -> None:
    usable = {"prompt_token_ids": [5] * 8, "completion_token_ids": [6] * 8}
    with pytest.raises(ProblemsError) as caught:
        read_prompts(write(tmp_path, usable, line), None, CONFIG, Score())
    (found,) = map(str, caught.value.problems)
    assert ", line 2: " in found
    assert problem in found


def test_a_text_without_tokens_can_t_be_scored(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ProblemsError, match="no token to score"):
        read_prompts(write(tmp_path, {"prompt": "the", "completion": ""}), tokenizer, CONFIG, Score())


def test_synthetic_prompts_are_seeded_and_avoid_special_ids() -> None:
    synthetic = SyntheticPrompts(count=5, prompt_tokens=8)
    prompts = synthetic_prompts(synthetic, CONFIG, GENERATE.max_new_tokens)
    assert prompts == load_prompts(Workload(prompts=synthetic, task=GENERATE), None, CONFIG)
    assert prompts != synthetic_prompts(replace(synthetic, seed=1), CONFIG, GENERATE.max_new_tokens)
    assert [len(prompt.token_ids) for prompt in prompts] == [8] * 5
    assert all(4 <= token_id < CONFIG.vocab_size for prompt in prompts for token_id in prompt.token_ids)
    assert len({prompt.custom_id for prompt in prompts}) == 5


def test_synthetic_prompts_stay_within_a_tiny_vocabulary() -> None:
    (prompt,) = synthetic_prompts(SyntheticPrompts(count=1, prompt_tokens=8), replace(CONFIG, vocab_size=3), 4)
    assert set(prompt.token_ids) == {2}


def test_synthetic_prompts_beyond_the_positions_are_refused() -> None:
    with pytest.raises(PromptError, match="shorten the prompt to 12 tokens"):
        synthetic_prompts(SyntheticPrompts(count=1, prompt_tokens=13), CONFIG, GENERATE.max_new_tokens)


def test_a_tokenizer_json_is_used_whole_and_decodes_without_special_tokens(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("the name of the town is written")
    assert token_ids[0] == BOS
    assert tokenizer.decode(token_ids) == "the name of the town is written"


def test_opts_older_files_get_their_bos_as_in_transformers(backend: tokenizers.Tokenizer, tmp_path: Path) -> None:
    backend.model.save(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "opt"}))
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "</s>")
    config = {**special, "add_bos_token": True, "add_prefix_space": False, "tokenizer_class": "GPT2Tokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, TransformersTokenizer)
    assert loaded.encode("the town") == (BOS, *backend.encode("the town").ids)
    assert loaded.decode(loaded.encode("the town")) == "the town"


def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert load_tokenizer(tmp_path) is None
    assert load_tokenizer(None) is None


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json"])
def test_a_broken_tokenizer_is_an_error_of_the_checkpoint(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "opt"}))
    (tmp_path / name).write_text("{")
    with pytest.raises(CheckpointError, match="the tokenizer can't be read"):
        load_tokenizer(tmp_path)
