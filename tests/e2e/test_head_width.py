"""A head whose features are wider than the rows of the embedding table."""

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from flexflow_engine.abc.model import LayerSpec, TensorSpec
from flexflow_plugins.models.opt import OPTModel
from harness import policy, random_prompts, reference_tokens, run_job, save_opt, three_tiers

HEAD, PROJECTION = "lm_head.weight", "model.decoder.project_out.weight"


class JoinedHeadOPT(OPTModel):
    """An OPT whose narrow head and the projection before it are one matrix [vocab_size, hidden_size]."""

    def tensors(self) -> tuple[TensorSpec, ...]:
        wide = TensorSpec(HEAD, (self.config.vocab_size, self.config.hidden_size), "matrix")
        return (*(spec for spec in super().tensors() if spec.name not in {HEAD, PROJECTION}), wide)

    def layers(self) -> tuple[LayerSpec, ...]:
        return tuple(replace(layer, matrices={}) if layer.kind == "final" else layer for layer in super().layers())


@pytest.mark.parametrize("weights", [{"device": 100.0}, {"disk": 100.0}])
def test_features_are_as_wide_as_the_head(tmp_path: Path, weights: dict[str, float]) -> None:
    narrow = save_opt(tmp_path / "opt", word_embed_proj_dim=32, tie_word_embeddings=False)
    prompts = random_prompts(5)
    expected = reference_tokens(narrow, prompts)
    _join_head(narrow)
    tiers = three_tiers(tmp_path)
    chosen = policy(tiers, weights=weights)
    joined = run_job(narrow, tiers, chosen, prompts, store=tmp_path / "store", model_class=JoinedHeadOPT)
    assert joined.tokens == expected


def _join_head(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    tensors[HEAD] = tensors[HEAD] @ tensors.pop(PROJECTION)
    save_file(tensors, path, metadata={"format": "pt"})
