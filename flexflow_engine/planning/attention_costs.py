"""Seconds of work that a whole step's attention and KV cache give each lane: the part of `planning.step_costs` that
depends on where attention runs.

    attention: device                 tier where it reads in place    any other tier
      prompts      compute            -                               full pages, write
      tokens       compute; encoding  -                               full pages, read; filled pages, write, and
                   of filled pages                                    layer_s and copies of whoever attends
    attention: host                   (a `pinned` tier)               (the disk)
      prompts      compute            begun and full pages, write     full pages, write; tail pages to host memory
      tokens       attention          -                               as above, but to and from host memory
                   and on the link of host memory each way, once a tile: queries, keys and values; what was attended to

With L decoder layers and b GPU batches of r rows, c numbers of keys and values and a of the query a token:

    attention lane    L * b * (task + layer + r * attention of one token over its context)         host's processor
    host.write        L * b transfers of r * (a + c) numbers
    host.read         L * b transfers of r * a numbers

Prompts go down to host tiers from slots of the compute tier where the host can't address that; else they are written
where they lie.
"""

from __future__ import annotations

from flexflow_engine.abc.codec import Codec
from flexflow_engine.abc.dtypes import ITEM_NBYTES
from flexflow_engine.abc.hardware import HardwareProfile
from flexflow_engine.abc.model import Model
from flexflow_engine.abc.policy import TierDescription
from flexflow_engine.abc.prediction import StepShape
from flexflow_engine.abc.step import RowStep
from flexflow_engine.abc.tier import HOST
from flexflow_engine.graph.task import ATTENTION_LANE, COMPUTE_LANE
from flexflow_engine.placement.attention import AttentionSite, site_of
from flexflow_engine.planning.arithmetic import Arithmetic
from flexflow_engine.planning.traffic import Lanes, LaneWork, Traffic


class AttentionCosts:
    """For one model, the codec of its cache and the recipe's tiers."""

    def __init__(
        self, model: Model, kv_codec: Codec, tiers: tuple[TierDescription, ...], profile: HardwareProfile
    ) -> None:
        self._model, self._config, self._kv_codec = model, model.config, kv_codec
        self._tiers, self._profile, self._item = tiers, profile, ITEM_NBYTES[model.dtype]

    def tile_s(self, shape: StepShape) -> float:
        """Attention of one GPU batch in one layer, where it runs, without what the task takes beside it."""
        prompts = shape.phase == "prefill"
        row = RowStep(
            row=0, sequence=0, new_tokens=shape.context if prompts else 1, context=0 if prompts else shape.context
        )
        arithmetic = self._arithmetic(shape)
        if prompts:
            return shape.gpu_batch_size * arithmetic.prompt_attention([row])
        attended_s = shape.gpu_batch_size * arithmetic.token_attention([row])
        return attended_s + (0.0 if self._kv_codec.keeps_bytes else self._full_pages_s(shape))

    def always(self, shape: StepShape) -> Lanes:
        """What attention on the host gives its own lane and the link in front of it, wherever the cache lies."""
        work, site = LaneWork(self._tiers, self._profile), site_of(shape.attention, self._tiers)
        if not self.is_apart(shape):
            return work.lanes
        tiles = self._tiles(shape)
        arithmetic = self._arithmetic(shape)
        work.lanes[ATTENTION_LANE] = tiles * (arithmetic.task_s + arithmetic.layer_s + self.tile_s(shape))
        if site.across_link:
            query = self._config.num_heads * self._config.head_dim
            cached = 2 * self._config.num_kv_heads * self._config.head_dim
            row_nbytes, host = shape.gpu_batch_size * self._item, self._tier(site.tier)
            work.carry(host, "write", Traffic(tiles, row_nbytes * (query + cached)), near=self._tiers[0].memory)
            work.carry(host, "read", Traffic(tiles, row_nbytes * query), near=self._tiers[0].memory)
        return work.lanes

    def is_apart(self, shape: StepShape) -> bool:
        """Whether attention is a task of its own, beside the layer's other computations."""
        return shape.attention == "host" and shape.phase == "decode"

    def cache(self, tier: TierDescription, shape: StepShape) -> Lanes:
        """All tiles' keys and values, if all of the cache lay on this tier."""
        work, site = LaneWork(self._tiers, self._profile), site_of(shape.attention, self._tiers)
        if shape.phase == "prefill" and site.across_link:
            self._prompts_from_slots(work, tier, site, shape)
        elif tier.name not in site.in_place:
            self._pages(work, tier, site, shape)
        return work.lanes

    def _pages(self, work: LaneWork, tier: TierDescription, site: AttentionSite, shape: StepShape) -> None:
        """Keys and values apart: pages that are full, in and out of a slot beside attention."""
        tiles, rows, near = self._tiles(shape), shape.gpu_batch_size, self._tier(site.tier).memory
        page_nbytes = self._page_nbytes(shape)
        full = Traffic(2 * tiles, rows * (shape.context // shape.kv_page_tokens) * page_nbytes)
        if shape.phase == "prefill":
            work.carry(tier, "write", full, near=near)
        else:
            work.carry(tier, "read", full, near=near)
            work.carry(tier, "write", Traffic(2 * tiles / shape.kv_page_tokens, rows * page_nbytes), near=near)
            if self._kv_codec.keeps_bytes:  # encoded ones are counted wherever they lie
                lane = ATTENTION_LANE if self.is_apart(shape) else COMPUTE_LANE
                work.lanes[lane] += tiles * self._full_pages_s(shape)

    def _full_pages_s(self, shape: StepShape) -> float:
        """To take what fills pages out of the tails of one GPU batch in one layer, in a step of many."""
        arithmetic = self._arithmetic(shape)
        return arithmetic.layer_s / shape.kv_page_tokens + shape.gpu_batch_size * arithmetic.kept(1)

    def _prompts_from_slots(self, work: LaneWork, tier: TierDescription, site: AttentionSite, shape: StepShape) -> None:
        """From the compute tier; where pages don't take single tokens, the last page's go to a tail."""
        tiles, rows, near = self._tiles(shape), shape.gpu_batch_size, self._tiers[0].memory
        by_tokens = tier.name in site.in_place and self._kv_codec.keeps_bytes
        begun = shape.kv_page_tokens - 1 if by_tokens else 0
        pages = rows * ((shape.context + begun) // shape.kv_page_tokens)
        work.carry(tier, "write", Traffic(2 * tiles, pages * self._page_nbytes(shape)), near=near)
        if not by_tokens:
            tail = self._page_numbers(shape) * self._item
            work.carry(self._tier(site.tier), "write", Traffic(tiles, 2 * rows * tail), near=near)

    def _arithmetic(self, shape: StepShape) -> Arithmetic:
        """Of the processor that attends. Raises HardwareError where the profile lacks it."""
        memory = HOST if self.is_apart(shape) else self._tiers[0].memory
        return Arithmetic(self._profile.processor(memory), self._config, self._model.dtype, self._kv_codec)

    def _page_nbytes(self, shape: StepShape) -> int:
        """Of one row's keys, or values, as they are stored."""
        page = (self._config.num_kv_heads, shape.kv_page_tokens, self._config.head_dim)
        return self._kv_codec.encoded_nbytes(page, self._model.dtype)

    def _page_numbers(self, shape: StepShape) -> int:
        return self._config.num_kv_heads * shape.kv_page_tokens * self._config.head_dim

    def _tiles(self, shape: StepShape) -> int:
        return self._config.num_layers * shape.num_gpu_batches

    def _tier(self, name: str) -> TierDescription:
        return next(tier for tier in self._tiers if tier.name == name)
