"""OPT keeps the contract of `Model`, in each of its variants."""

from pathlib import Path

from flexflow_engine.testing.model_suite import ModelTests
from flexflow_plugins.models.opt import OPTModel
from harness import save_opt


class TestPreNormOPT(ModelTests):
    model_class = OPTModel

    def make_checkpoint(self, tmp_path: Path) -> Path:
        return save_opt(tmp_path)


class TestPostNormOPTWithProjection(ModelTests):
    """As opt-350m."""

    model_class = OPTModel

    def make_checkpoint(self, tmp_path: Path) -> Path:
        return save_opt(tmp_path, do_layer_norm_before=False, word_embed_proj_dim=32)


class TestUntiedOPT(ModelTests):
    model_class = OPTModel

    def make_checkpoint(self, tmp_path: Path) -> Path:
        return save_opt(tmp_path, tie_word_embeddings=False)
