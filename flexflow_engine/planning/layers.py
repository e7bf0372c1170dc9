"""Steps of a deep model, from a few of its decoder layers.

Decoder layers are all of one shape, but for what rounding to pages or rows leaves to the next: a step is simulated with
the first few of them and again with a few more, and every further layer is taken to add what those added. Of one step a
third number of layers is simulated:

    seconds     few  . . more . . check
                 |--------|-----. . |. . . . . . . layers      how far `check` is off the line, the layers beyond are
                                                               off by, the further the more
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from flexflow_engine.abc.step import Step
from flexflow_engine.placement.layout import Layout
from flexflow_engine.placement.weights import PlacedLayer
from flexflow_engine.planning.sampling import on_line
from flexflow_engine.planning.simulate import Simulator, StepRun

FEW_LAYERS, MORE_LAYERS = 2, 5
"""Decoder layers simulated; the first ones fill the pipeline, so none is measured by itself."""
CHECK_LAYERS = FEW_LAYERS + MORE_LAYERS


class LayerSample:
    """For one layout. Changing: `_simulated`, by step what few and more layers took."""

    def __init__(self, layout: Layout, simulator: Callable[[Layout], Simulator]) -> None:
        few, more, check = (
            simulator(first_decoders(layout, count)) for count in (FEW_LAYERS, MORE_LAYERS, CHECK_LAYERS)
        )
        self._few, self._more, self._check = few, more, check
        self._layers = len(layout.kv.tiles)
        self._simulated: dict[int, tuple[StepRun, StepRun]] = {}

    def run(self, steps: Sequence[Step]) -> list[StepRun]:
        """What these adjoining steps take with all layers."""
        runs = list(zip(self._few.run(steps), self._more.run(steps), strict=True))
        self._simulated.update(zip((step.index for step in steps), runs, strict=True))
        return [_extended(few, more, self._layers) for few, more in runs]

    def relative_error(self, steps: Sequence[Step]) -> float:
        """How far off, as a fraction, the last of these adjoining steps may be, all of which `run` was asked about."""
        few, more = self._simulated[steps[-1].index]
        off_s = abs(self._check.run(steps)[-1].seconds - _extended(few, more, CHECK_LAYERS).seconds)
        further = (self._layers - MORE_LAYERS) / (CHECK_LAYERS - MORE_LAYERS)
        return off_s * further / _extended(few, more, self._layers).seconds


def first_decoders(layout: Layout, count: int) -> Layout:
    """The layout of the same model with only its first decoder layers; what lies on tiers stays as it is."""
    skipped = {x.index for x in layout.weights.layers if x.spec.kind == "decoder" and layout.decoder(x.index) >= count}
    kept = [layer for layer in layout.weights.layers if layer.index not in skipped]
    layers = tuple(PlacedLayer(index, x.spec, x.runs, x.first_row) for index, x in enumerate(kept))
    return replace(
        layout,
        weights=replace(layout.weights, layers=layers),
        kv=replace(layout.kv, tiles=layout.kv.tiles[:count]),
    )


def _extended(few: StepRun, more: StepRun, layers: int) -> StepRun:
    """The step with so many decoder layers, from its runs with FEW_LAYERS and MORE_LAYERS of them."""
    return on_line(few, more, (layers - FEW_LAYERS) / (MORE_LAYERS - FEW_LAYERS))
