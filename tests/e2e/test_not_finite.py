"""A model whose numbers overflow, or are none, ends a run that generates: no token of it means anything."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from commands import CommandLine, write_recipe
from flexflow_engine.abc.model import LayerWeights
from flexflow_engine.errors import NotFiniteError
from flexflow_plugins.models.opt import OPTModel
from harness import JobResult, policy, random_prompts, run_job, save_opt, three_tiers
from layouts import DEVICE_HOST_DISK, lay_out, opt, setups

VOCABULARY = 2000
TABLE = "model.decoder.embed_tokens.weight"
POSITIONS = "model.decoder.embed_positions.weight"
FIRST_POSITION = 2
"""The row of a prompt's first token."""
PROMPTS = random_prompts(3, longest=6)
FIRST_TOKEN = r"sequence \d: step 0: the model's logits for token 1 are no finite numbers"


class OverflowingOPT(OPTModel):
    """An OPT whose logits are beyond any float's range."""

    def logits(self, weights: LayerWeights, features: torch.Tensor) -> torch.Tensor:
        return super().logits(weights, features).abs_() * torch.inf


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_opt(tmp_path / "opt", vocab_size=VOCABULARY)


def run(
    checkpoint: Path, model_class: type[OPTModel] = OPTModel, completions: tuple[tuple[int, ...], ...] = ()
) -> JobResult:
    tiers = three_tiers(checkpoint)
    store = checkpoint / "store"
    return run_job(
        checkpoint, tiers, policy(tiers), PROMPTS, store=store, model_class=model_class, completions=completions
    )


def spoil(checkpoint: Path, row: int, tensor: str = TABLE) -> None:
    """A row is no numbers from now on; in the table, it makes the logit of one token."""
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    tensors[tensor][row] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})


def test_the_head_runs_in_several_parts() -> None:
    tiers = DEVICE_HOST_DISK
    layout = lay_out(opt(vocab_size=VOCABULARY), tiers, policy(setups(tiers)))
    assert [layer.spec.kind for layer in layout.weights.layers].count("head") >= 3


@pytest.mark.parametrize("token_id", [0, 1000, VOCABULARY - 1])
def test_a_logit_that_is_no_number_is_found_in_any_part_of_the_head(checkpoint: Path, token_id: int) -> None:
    spoil(checkpoint, token_id)
    with pytest.raises(NotFiniteError, match=FIRST_TOKEN):
        run(checkpoint)


def test_logits_that_overflow_are_found(checkpoint: Path) -> None:
    with pytest.raises(NotFiniteError, match=FIRST_TOKEN):
        run(checkpoint, OverflowingOPT)


@pytest.fixture
def spoilt_recipe(checkpoint: Path, tmp_path: Path) -> Path:
    """Three prompts compute in the first step, and end with it but for the second, which has a token too many."""
    spoil(checkpoint, FIRST_POSITION + 11, POSITIONS)
    return write_recipe(tmp_path / "job", checkpoint, [(5,) * length for length in (4, 12, 6)], max_new_tokens=1)


def test_what_ended_in_the_same_step_is_kept(command: CommandLine, spoilt_recipe: Path) -> None:
    outcome = command("run", spoilt_recipe)
    outcome.assert_user_error()
    assert "the model's logits for token 1 are no finite numbers" in outcome.stderr
    assert "2 of 3 completions are in job.completions.jsonl.partial; run again to go on" in outcome.stderr


def test_its_prompt_is_named_by_the_run_that_goes_on_too(command: CommandLine, spoilt_recipe: Path) -> None:
    for outcome in [command("run", spoilt_recipe) for _ in range(2)]:
        assert "error: prompt 'line-2': step 0: the model's logits for token 1 are no finite" in outcome.stderr


def test_given_tokens_are_scored_all_the_same(checkpoint: Path) -> None:
    spoil(checkpoint, VOCABULARY - 1)
    result = run(checkpoint, completions=((5, 6), (7,), (8,)))
    assert [len(found) for found in result.logprobs.values()] == [2, 1, 1]
    assert np.isnan([logprob for found in result.logprobs.values() for logprob in found]).all()
