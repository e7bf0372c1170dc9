"""One tile while its tasks are emitted."""

from __future__ import annotations

from dataclasses import dataclass

from flexflow_engine.abc.step import BatchStep
from flexflow_engine.graph.task import Tile
from flexflow_engine.placement.weights import PlacedLayer


@dataclass(slots=True)
class TileWork:
    """What it computes, and the slots that its loads have been given so far; None where nothing is loaded."""

    tile: Tile
    layer: PlacedLayer
    batch: BatchStep
    weights: int | None = None
    embed: int | None = None
    hidden: int | None = None
    kv: int | None = None
    prompt: int | None = None
    attention: int | None = None

    def follows(self, other: TileWork) -> bool:
        """Whether it continues what another tile of the same GPU batch computes."""
        return other.tile.gpu_batch == self.tile.gpu_batch
