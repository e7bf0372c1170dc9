"""The published shapes, for arithmetic."""

from __future__ import annotations

from flexflow_plugins.models.opt_sizes import PUBLISHED
from throughput.roofline import Shape


def published_shape(model: str) -> Shape:
    """The shape of a published OPT checkpoint, by its short name."""
    config = PUBLISHED[f"facebook/{model}"]
    return Shape(layers=config["num_hidden_layers"], hidden=config["hidden_size"], vocabulary=config["vocab_size"])
