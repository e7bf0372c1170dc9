"""Seconds of work that a whole step gives each lane, linear in the shares of a placement.

What `planning.cost` says of single tasks, summed in closed form without laying anything out: fractions of pages count
as fractions, and every row does the same. How transfers become seconds stands in `planning.traffic`; what lanes lose to
one another counts as work, under names of their own for pairs of lanes (`planning.contention`).

    weights      a layer's pages once a step               read lanes of their tier
    kv_cache     planning.attention_costs                  read and write lanes
    activations  hidden states between two layers          read and write lanes, once a tile
    compute      every layer's task, matmuls and vectors, once a tile; decoding of its weights, once a step, or with
                 every product of a tile; attention, where the compute tier attends. Where nothing else has work,
                 by the rates of a processor that only computes

With attention on the host a layer of generated tokens is two tasks on the compute tier. What keeps the two processors
from working at once is a lane of its own here, TURNS, which takes compute + f * attention:

    f = 1        they are one processor, or there is one GPU batch: each waits for the other
    f = 1 / b    weights are encoded: one layer is decoded at a time, so its last GPU batch's attention is waited for
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from flexflow_engine.abc.codec import Codec
from flexflow_engine.abc.dtypes import ITEM_NBYTES
from flexflow_engine.abc.hardware import HardwareProfile
from flexflow_engine.abc.model import LayerKind, LayerSpec, Model
from flexflow_engine.abc.policy import TensorClass, TierDescription
from flexflow_engine.abc.prediction import StepCosts, StepShape
from flexflow_engine.abc.tier import HOST
from flexflow_engine.graph.lanes import read_lane
from flexflow_engine.graph.task import ATTENTION_LANE, COMPUTE_LANE
from flexflow_engine.placement.layout import multiplies_as_encoded
from flexflow_engine.placement.pages import PagedTensor
from flexflow_engine.placement.reach import direct_tiers
from flexflow_engine.planning.arithmetic import Arithmetic
from flexflow_engine.planning.attention_costs import AttentionCosts
from flexflow_engine.planning.contention import Contention
from flexflow_engine.planning.cost import distinct
from flexflow_engine.planning.traffic import Lanes, LaneWork, Traffic

TURNS = f"{COMPUTE_LANE}, {ATTENTION_LANE} by turns"


@dataclass(frozen=True, slots=True)
class _LayerKind:
    """What layers that cost the same have in common."""

    kind: LayerKind
    matrices: tuple[tuple[int, int], ...]
    """(out_features, in_features) of each."""
    codec: Codec | None
    """Of all of them; None where there are none."""

    @property
    def numbers(self) -> int:
        return sum(rows * columns for rows, columns in self.matrices)

    @property
    def out_features(self) -> int:
        """Of all matrices."""
        return sum(rows for rows, _ in self.matrices)


class StepCostModel:
    """For one model, its codecs and the recipe's tiers."""

    def __init__(
        self,
        *,
        model: Model,
        tensors: tuple[PagedTensor, ...],
        kv_codec: Codec,
        tiers: tuple[TierDescription, ...],
        profile: HardwareProfile,
    ) -> None:
        self._model, self._tiers, self._profile = model, tiers, profile
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._table = self._tensors[next(layer.table for layer in model.layers() if layer.table)]
        self._direct = direct_tiers(tiers)
        self._contention = Contention(tiers, profile)
        self._kinds = Counter(self._kind(layer) for layer in model.layers())
        self._matrices = Counter(self._pages(name) for layer in model.layers() for name in layer.matrices.values())
        processor = profile.processor(tiers[0].memory)
        team = processor.torch_team.get(model.dtype)
        self._arithmetic = Arithmetic(processor, model.config, model.dtype, kv_codec)
        self._unmoved = Arithmetic(processor, model.config, model.dtype, kv_codec, team) if team else None
        self._attention = AttentionCosts(model, kv_codec, tiers, profile)

    def costs(self, shape: StepShape) -> StepCosts:
        """Raises HardwareError where the profile lacks what the tiers need."""
        placed: dict[tuple[TensorClass, str], Lanes] = {}
        for tier in self._tiers:
            if tier.placeable and tier.name not in self._direct:
                placed["weights", tier.name] = self._weights(tier, shape)
                placed["kv_cache", tier.name] = self._attention.cache(tier, shape)
                placed["activations", tier.name] = self._activations(tier, shape)
        always = self._always(shape)
        working = frozenset(lane for lanes in (always, *placed.values()) for lane, work in lanes.items() if work)
        return StepCosts(
            always=self._contention.bounds(always, working),
            placed={share: self._contention.bounds(lanes, working) for share, lanes in placed.items()},
            unmoved=self._where_nothing_moves(shape),
        )

    def _always(self, shape: StepShape) -> Lanes:
        compute_s = self._compute_s(self._arithmetic, shape)
        lanes = {COMPUTE_LANE: compute_s, **self._attention.always(shape)}
        if ATTENTION_LANE in lanes and (waiting := self._waiting(shape)):
            lanes[TURNS] = compute_s + waiting * lanes[ATTENTION_LANE]
        return lanes

    def _where_nothing_moves(self, shape: StepShape) -> Lanes:
        """Empty where that changes no rate."""
        if self._unmoved is None or shape.attention == "host":
            return {}
        return {COMPUTE_LANE: self._compute_s(self._unmoved, shape)}

    def _compute_s(self, arithmetic: Arithmetic, shape: StepShape) -> float:
        return sum(count * self._layer_s(arithmetic, kind, shape) for kind, count in self._kinds.items())

    def _waiting(self, shape: StepShape) -> float:
        """The fraction of attention that the compute tier waits for."""
        if self._tiers[0].memory == HOST or shape.num_gpu_batches == 1:
            return 1.0
        return 0.0 if self._table.codec.keeps_bytes else 1 / shape.num_gpu_batches

    def _kind(self, layer: LayerSpec) -> _LayerKind:
        matrices = [self._tensors[name] for name in layer.matrices.values()]
        sizes = tuple((tensor.rows, tensor.columns) for tensor in matrices)
        return _LayerKind(layer.kind, sizes, matrices[0].codec if matrices else None)

    def _pages(self, name: str) -> Traffic:
        """A matrix, page by page; in host memory adjoining pages are one move, whose latencies are small there."""
        tensor = self._tensors[name]
        return Traffic(tensor.num_pages, tensor.nbytes / tensor.num_pages)

    def _layer_s(self, arithmetic: Arithmetic, layer: _LayerKind, shape: StepShape) -> float:
        """Of all GPU batches."""
        whole, last = _new_tokens(shape), shape.gpu_batch_size
        tokens = whole if layer.kind in {"embed", "decoder"} else last
        tile = arithmetic.task_s + arithmetic.vectors(layer.out_features, tokens)
        product, memory = (layer.numbers, tokens, len(layer.matrices)), self._tiers[0].memory
        if encoded := layer.codec is not None and multiplies_as_encoded(memory, layer.codec):
            tile += arithmetic.encoded_matmul(*product, layer.codec)
        else:
            tile += arithmetic.matmul(*product)
        if layer.kind == "decoder":
            tile += arithmetic.layer_s
            apart = self._attention.is_apart(shape)
            tile += arithmetic.task_s if apart else self._attention.tile_s(shape)
        tiles = shape.num_gpu_batches * tile
        if encoded or layer.codec is None or layer.codec.keeps_bytes:
            return tiles
        return tiles + arithmetic.task_s + arithmetic.decoded(layer.numbers, layer.codec)

    def _weights(self, tier: TierDescription, shape: StepShape) -> Lanes:
        work = LaneWork(self._tiers, self._profile)
        for pages, count in self._matrices.items():
            work.carry(tier, "read", Traffic(count * pages.count, pages.nbytes), near=self._tiers[0].memory)
        self._gather(work.lanes, tier, shape)
        return work.lanes

    def _gather(self, lanes: dict[str, float], tier: TierDescription, shape: StepShape) -> None:
        """Rows of the embedding table."""
        units = shape.num_gpu_batches * distinct(self._table.num_units, _new_tokens(shape))
        unit_s = 0.0 if tier.read_by_host else self._profile.link(tier, "read").gathered_unit_s
        lanes[read_lane(tier.name)] += units * (unit_s + self._profile.host.gather_row_s)

    def _activations(self, tier: TierDescription, shape: StepShape) -> Lanes:
        """Every decoder layer reads and writes them, the embedding writes and the final layer reads."""
        config, work, near = self._model.config, LaneWork(self._tiers, self._profile), self._tiers[0].memory
        nbytes = _new_tokens(shape) * config.hidden_size * ITEM_NBYTES[self._model.dtype]
        tiles = (config.num_layers + 1) * shape.num_gpu_batches
        work.carry(tier, "read", Traffic(tiles, nbytes), near=near)
        work.carry(tier, "write", Traffic(tiles, nbytes), near=near)
        return work.lanes


def _new_tokens(shape: StepShape) -> int:
    """Of one GPU batch."""
    return shape.gpu_batch_size * (shape.context if shape.phase == "prefill" else 1)
