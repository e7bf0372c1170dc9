"""Seconds of work that a whole step gives each lane, linear in the shares of a placement.

What `planning.cost` says of single tasks, summed in closed form without laying anything out: fractions of pages count
as fractions, and every row does the same. A lane of width w that carries N transfers of b bytes, each with latency l,
takes N * max(b / rate, (l + b / rate) / w) seconds.

    weights      a layer's pages once a step               read lanes of their tier
    kv_cache     decode: full pages once a tile            read lanes
                 the tokens that pages take                write lanes, 2 transfers a row and page
    activations  hidden states between two layers          read and write lanes, once a tile
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

from flexflow_engine.abc.codec import Codec
from flexflow_engine.abc.dtypes import ITEM_NBYTES
from flexflow_engine.abc.hardware import Direction, HardwareProfile
from flexflow_engine.abc.model import LayerKind, LayerSpec, Model
from flexflow_engine.abc.policy import TensorClass, TierDescription
from flexflow_engine.abc.prediction import StepCosts, StepShape
from flexflow_engine.abc.step import RowStep
from flexflow_engine.abc.tier import HOST
from flexflow_engine.graph.lanes import read_lane, write_lane
from flexflow_engine.graph.task import COMPUTE_LANE
from flexflow_engine.placement.attention import direct_tiers
from flexflow_engine.placement.pages import PagedTensor
from flexflow_engine.planning.arithmetic import Arithmetic
from flexflow_engine.planning.cost import distinct

Lanes = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class _Traffic:
    """Transfers of one size in a step."""

    count: float
    nbytes: float


@dataclass(frozen=True, slots=True)
class _LayerKind:
    """What layers that cost the same have in common."""

    kind: LayerKind
    numbers: int
    """Of all matrices."""
    out_features: int


class StepCostModel:
    """For one model, its codecs and the recipe's tiers."""

    def __init__(
        self,
        *,
        model: Model,
        tensors: tuple[PagedTensor, ...],
        weight_codec: Codec,
        kv_codec: Codec,
        tiers: tuple[TierDescription, ...],
        profile: HardwareProfile,
    ) -> None:
        self._model, self._tiers, self._profile = model, tiers, profile
        self._weight_codec, self._kv_codec = weight_codec, kv_codec
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._direct = direct_tiers(tiers)
        self._kinds = Counter(self._kind(layer) for layer in model.layers())
        self._matrices = Counter(self._pages(name) for layer in model.layers() for name in layer.matrices.values())
        self._arithmetic = Arithmetic(profile.processor(tiers[0].memory), model.config, model.dtype, kv_codec)

    def costs(self, shape: StepShape) -> StepCosts:
        """Raises HardwareError where the profile lacks what the tiers need."""
        always = {COMPUTE_LANE: sum(count * self._layer_s(kind, shape) for kind, count in self._kinds.items())}
        placed: dict[tuple[TensorClass, str], Lanes] = {}
        for tier in self._tiers:
            if tier.name not in self._direct:
                placed["weights", tier.name] = self._weights(tier, shape)
                placed["kv_cache", tier.name] = self._kv(tier, shape)
                placed["activations", tier.name] = self._activations(tier, shape)
        return StepCosts(always=always, placed=placed)

    def _kind(self, layer: LayerSpec) -> _LayerKind:
        matrices = [self._tensors[name] for name in layer.matrices.values()]
        numbers = sum(tensor.rows * tensor.columns for tensor in matrices)
        return _LayerKind(layer.kind, numbers, sum(tensor.rows for tensor in matrices))

    def _pages(self, name: str) -> _Traffic:
        """A matrix, page by page."""
        tensor = self._tensors[name]
        return _Traffic(tensor.num_pages, tensor.nbytes / tensor.num_pages)

    def _layer_s(self, layer: _LayerKind, shape: StepShape) -> float:
        """Of all GPU batches."""
        numbers, rows = layer.numbers, _rows(shape)
        tokens = sum(row.new_tokens for row in rows) if layer.kind in {"embed", "decoder"} else len(rows)
        tile = self._arithmetic.task_s + self._arithmetic.matmul(numbers, tokens)
        tile += self._arithmetic.vectors(layer.out_features, tokens)
        if layer.kind == "decoder":
            prompts = shape.phase == "prefill"
            tile += self._arithmetic.prompt_attention(rows) if prompts else self._arithmetic.token_attention(rows)
        decoded = 0.0
        if numbers and not self._weight_codec.keeps_bytes:
            decoded = self._arithmetic.task_s + self._arithmetic.decoded(numbers, self._weight_codec)
        return shape.num_gpu_batches * tile + decoded

    def _weights(self, tier: TierDescription, shape: StepShape) -> Lanes:
        lanes: dict[str, float] = defaultdict(float)
        for pages, count in self._matrices.items():
            self._carry(lanes, tier, "read", replace(pages, count=count * pages.count))
        self._gather(lanes, tier, shape)
        return lanes

    def _gather(self, lanes: dict[str, float], tier: TierDescription, shape: StepShape) -> None:
        """Rows of the embedding table."""
        table = self._tensors[next(layer.table for layer in self._model.layers() if layer.table)]
        tokens = sum(row.new_tokens for row in _rows(shape))
        units = shape.num_gpu_batches * distinct(table.num_units, tokens)
        link = self._profile.link(tier, "read")
        lanes[read_lane(tier.name)] += units * (link.latency_s + self._profile.host.gather_row_s)

    def _kv(self, tier: TierDescription, shape: StepShape) -> Lanes:
        """A tile's keys and values, for all tiles."""
        config, lanes = self._model.config, defaultdict[str, float](float)
        page = (config.num_kv_heads, shape.kv_page_tokens, config.head_dim)
        page_nbytes = 2 * self._kv_codec.encoded_nbytes(page, self._model.dtype)
        tiles, rows = config.num_layers * shape.num_gpu_batches, shape.gpu_batch_size
        pages = rows * (shape.context // shape.kv_page_tokens)
        if shape.phase == "prefill":
            self._carry(lanes, tier, "write", _Traffic(2 * tiles, pages * page_nbytes / 2))
        else:
            filled = rows / shape.kv_page_tokens
            self._carry(lanes, tier, "read", _Traffic(2 * tiles, pages * page_nbytes / 2))
            self._carry(lanes, tier, "write", _Traffic(2 * tiles * filled, page_nbytes / 2))
        return lanes

    def _activations(self, tier: TierDescription, shape: StepShape) -> Lanes:
        """Every decoder layer reads and writes them, the embedding writes and the final layer reads."""
        config, lanes = self._model.config, defaultdict[str, float](float)
        tokens = sum(row.new_tokens for row in _rows(shape))
        nbytes = tokens * config.hidden_size * ITEM_NBYTES[self._model.dtype]
        tiles = (config.num_layers + 1) * shape.num_gpu_batches
        self._carry(lanes, tier, "read", _Traffic(tiles, nbytes))
        self._carry(lanes, tier, "write", _Traffic(tiles, nbytes))
        return lanes

    def _carry(self, lanes: dict[str, float], tier: TierDescription, direction: Direction, traffic: _Traffic) -> None:
        """Add what transfers between a tier and the compute tier give the lanes that they pass through."""
        staging = next((t for t in self._tiers[1:] if t.memory == HOST), None)
        staged = HOST not in {tier.memory, self._tiers[0].memory}
        for passed in (tier, staging) if staged and staging else (tier,):
            link = self._profile.link(passed, direction)
            reads = direction == "read"
            width = passed.read_concurrency if reads else passed.write_concurrency
            seconds = traffic.nbytes / link.bytes_per_s
            lane = read_lane(passed.name) if reads else write_lane(passed.name)
            lanes[lane] += traffic.count * max(seconds, (link.latency_s + seconds) / width)


def _rows(shape: StepShape) -> list[RowStep]:
    """One GPU batch."""
    prompts = shape.phase == "prefill"
    new_tokens, context = (shape.context, 0) if prompts else (1, shape.context)
    return [
        RowStep(row=row, sequence=row, new_tokens=new_tokens, context=context) for row in range(shape.gpu_batch_size)
    ]
