"""Where every byte of a run lies: residents, slots and workspace of one policy, known before the first byte moves.

The same layout is compiled into task graphs, allocated by the runtime and summed into the memory table
(`placement.memory`).

    locations on the compute tier                    on every tier that is named
    small                 norms, biases, positions   weights.TENSOR.UNIT      resident pages
    weights.slot.S        a layer being loaded       kv.LAYER.BATCH.N.k, .v   rectangles of the cache
    hidden.slot.S         a tile's hidden states     hidden.BATCH.ROW         hidden states
    embed.slot.S          rows of the table
    weights.decoded       a layer, where encoded     on the tier of attention (placement.attention)
                          ones can't be multiplied   kv.slot.S                a tile's cache
    features.BATCH                                   kv.LAYER.BATCH.tail      tail pages
    candidates.BATCH.values, .ids,                   kv.decoded               a rectangle, where the cache is
    .logsumexps, .logits                             encoded and no kernel decodes it

    on the staging tier, where the host can't        with attention on the host
    address the compute tier                         attention.host.S         a tile's queries, keys and values, then
    staging.S       from and to the disk                                      what they attend to
    staging.embed   rows of the table
                                                     on a compute tier that the host can't address
                                                     attention.device.S       the same
                                                     kv.prompt.S.pages, .tails  what prompts fill of a tile's cache
"""

from __future__ import annotations

from dataclasses import dataclass

from flexflow_engine.abc.codec import Codec
from flexflow_engine.abc.policy import Policy, TierDescription
from flexflow_engine.abc.tier import HOST
from flexflow_engine.placement.activations import ActivationLayout
from flexflow_engine.placement.attention import AttentionSite
from flexflow_engine.placement.kv import KVLayout, KVTile
from flexflow_engine.placement.reach import direct_tiers, is_staged, staging_tier
from flexflow_engine.placement.span import Span
from flexflow_engine.placement.weights import Page, Run, WeightLayout
from flexflow_engine.placement.workspace import Workspace

WEIGHT_SLOTS = 2
"""One layer is computed while the next one loads."""
KV_SLOTS = 2
HIDDEN_SLOTS = 3
"""One being stored, one computed on, one loading."""
EMBED_SLOTS = 2
STAGING_SLOTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """All of it. `tiers` are the recipe's, fastest first, and the staging tier that a recipe may lack."""

    tiers: tuple[TierDescription, ...]
    policy: Policy
    attention: AttentionSite
    weights: WeightLayout
    kv: KVLayout
    activations: ActivationLayout
    small_offsets: dict[str, int]
    """Byte offset of each small tensor in the region `small`."""
    small_nbytes: int
    embed_rows: int
    """Rows of the embedding table that one GPU batch looks up at most."""
    embed_row_nbytes: int
    item_nbytes: int
    """Of a number as it is computed with."""
    decodes_weights: bool
    """Whether matrices are decoded, a layer at a time, before they are multiplied."""
    multiplies_encoded: bool
    """Whether they are multiplied as they are encoded."""
    attends_in_kernel: bool
    """Whether the host's kernel reads the cache, encoded or not."""
    decodes_kv: bool
    """Whether pages are decoded, a rectangle at a time, before attention reads them."""
    only_computes: bool
    """Whether the job has one lane with work: all weights, the cache and all activations are where they are computed
    on, and the compute tier attends."""
    attention_width: int
    """Numbers of one token's query, over all heads."""
    kv_width: int
    """Numbers of one token's key, or value, over all heads."""
    workspace: Workspace
    staging_nbytes: int
    """Size of a staging slot: the largest page; 0 when the host addresses every other tier, or the compute tier."""

    @property
    def device(self) -> TierDescription:
        """The tier where the model computes."""
        return self.tiers[0]

    @property
    def direct(self) -> frozenset[str]:
        """Tiers that are computed on in place."""
        return direct_tiers(self.tiers)

    @property
    def hidden_size(self) -> int:
        """Numbers of one token's hidden state."""
        return self.activations.token_nbytes // self.item_nbytes

    @property
    def features_nbytes(self) -> int:
        """Bytes of what the head multiplies, of one row."""
        return self.weights.layers[-1].runs[0].tensor.columns * self.item_nbytes

    @property
    def inputs_width(self) -> int:
        """Numbers of one token's query, key and value, over all heads."""
        return self.attention_width + 2 * self.kv_width

    def attention_nbytes(self, rows: int) -> int:
        """Bytes of one new token's query, key and value in each of `rows` rows."""
        return rows * self.inputs_width * self.item_nbytes

    def attended_nbytes(self, rows: int) -> int:
        """Bytes of what one new token attends to in each of `rows` rows."""
        return rows * self.attention_width * self.item_nbytes

    def tier(self, name: str) -> TierDescription:
        return next(tier for tier in self.tiers if tier.name == name)

    @property
    def staging(self) -> str | None:
        """The tier of the staging slots; None without one."""
        tier = staging_tier(self.tiers)
        return tier.name if tier else None

    @property
    def far_table_tiers(self) -> list[str]:
        """Tiers whose rows of the embedding table are gathered into a slot of the compute tier, in order of names."""
        return sorted({run.tier for run in self.weights.table} - self.direct)

    @property
    def stages_rows(self) -> bool:
        """Whether these rows pass through host memory."""
        return self.device.memory != HOST and bool(self.far_table_tiers)

    def decoder(self, layer: int) -> int:
        """Which decoder layer a layer of the engine is, counted from 0."""
        return layer - next(x.index for x in self.weights.layers if x.spec.kind == "decoder")

    def kv_tile(self, layer: int, gpu_batch: int) -> KVTile:
        return self.kv.tiles[self.decoder(layer)][gpu_batch]

    def unit_span(self, run: Run, unit: int) -> Span:
        """Where one unit of a run's tensor lies, counted from the tensor's start."""
        if self.tier(run.tier).reads_store:
            return Span(run.tier, store_region(run.tensor.name), unit, 1)
        return Span(run.tier, run.region, unit - run.first_unit, 1)

    def page_span(self, run: Run, page: Page) -> Span:
        """Where a page of weights lies: in its run's region, or in the stored tensor where the tier reads the store."""
        first = self.unit_span(run, page.first_unit)
        return Span(first.tier, first.region, first.first, page.num_units)

    def is_staged(self, one: str, other: str) -> bool:
        """Whether bytes between two tiers pass through host memory."""
        return is_staged(self.tier(one).memory, self.tier(other).memory)


def store_region(tensor: str) -> str:
    """Name under which the runtime attaches a stored tensor to a tier that reads the store."""
    return f"store.{tensor}"


def multiplies_as_encoded(memory: str | None, codec: Codec) -> bool:
    """Whether weights of this codec are multiplied without being decoded first, a layer at a time."""
    return memory == HOST and codec.decodes_in_kernels


def attended_in_kernel(memory: str | None, codec: Codec) -> bool:
    """Whether the host's kernel attends to a cache of this codec; if not, torch does, on pages that were decoded."""
    return memory == HOST and (codec.keeps_bytes or codec.decodes_in_kernels)
