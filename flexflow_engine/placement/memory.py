"""The regions of a layout, and the memory table they add up to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from flexflow_engine.abc.policy import MemoryLine, MemoryTable, TensorClass
from flexflow_engine.abc.tier import RegionSpec
from flexflow_engine.placement.attention import ATTENTION_SLOTS
from flexflow_engine.placement.layout import EMBED_SLOTS, HIDDEN_SLOTS, KV_SLOTS, STAGING_SLOTS, WEIGHT_SLOTS, Layout

CANDIDATE_NBYTES = {"values": 4, "ids": 8, "logsumexps": 4, "logits": 4}
"""Of each row while the head runs part by part, whatever the job asks for: see `runtime.next_tokens`."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """A region that the runtime makes on a tier, and the line of the memory table that it belongs to."""

    tier: str
    what: str
    spec: RegionSpec


def allocations(layout: Layout) -> tuple[Allocation, ...]:
    """Every region of the layout, in a fixed order. Weights on a tier that reads the store are not among them."""
    return (
        *_weights(layout),
        *_kv(layout),
        *_attention(layout),
        *_activations(layout),
        *_embedding(layout),
        *_results(layout),
        *_staging(layout),
    )


def memory_table(layout: Layout) -> MemoryTable:
    """What lies on each tier, in the recipe's order of tiers; the sums are what the tiers will count as their peak."""
    sums: dict[tuple[str, str], int] = {}
    for allocation in allocations(layout):
        key = allocation.tier, allocation.what
        sums[key] = sums.get(key, 0) + allocation.spec.nbytes
    for tier in layout.tiers:
        if tier.reads_store and (placed := sum(run.nbytes for run in layout.weights.placed(tier.name))):
            sums[tier.name, "weights"] = placed
    for name, nbytes in workspaces(layout).items():
        sums[name, "workspace"] = nbytes
    lines = [MemoryLine(tier, what, nbytes) for tier, what, nbytes in _in_order(layout, sums)]
    return MemoryTable(tuple(lines), {tier.name: tier.budget_bytes for tier in layout.tiers})


def workspaces(layout: Layout) -> dict[str, int]:
    """Bytes of each tier that computations take without a region."""
    nbytes = {layout.device.name: layout.workspace.device_nbytes}
    if layout.attention.on_host:
        host = layout.attention.tier
        nbytes[host] = nbytes.get(host, 0) + layout.workspace.attention_nbytes
    return nbytes


def placed_bytes(layout: Layout) -> dict[TensorClass, dict[str, int]]:
    """Bytes of each tensor class on each tier, for the metrics; large parameters only, as the shares speak of them."""
    tiers = [tier.name for tier in layout.tiers]
    rectangles = [r for row in layout.kv.tiles for tile in row for r in tile.rectangles]
    parts = [part for batch in layout.activations.parts for part in batch]
    return {
        "weights": {t: sum(run.nbytes for run in layout.weights.placed(t)) for t in tiers},
        "kv_cache": {t: sum(2 * r.num_units * layout.kv.page_nbytes for r in rectangles if r.tier == t) for t in tiers},
        "activations": {
            t: sum(layout.activations.units(p) * layout.activations.token_nbytes for p in parts if p.tier == t)
            for t in tiers
        },
    }


def _in_order(layout: Layout, sums: dict[tuple[str, str], int]) -> Iterator[tuple[str, str, int]]:
    for tier in layout.tiers:
        yield from ((name, what, nbytes) for (name, what), nbytes in sums.items() if name == tier.name)


def _weights(layout: Layout) -> Iterator[Allocation]:
    device = layout.device.name
    yield _region(device, "small weights", "small", layout.small_nbytes, 1)
    for tier in layout.tiers:
        if not tier.reads_store:
            for run in layout.weights.placed(tier.name):
                yield _region(tier.name, "weights", run.region, run.num_units, run.tensor.unit_nbytes)
    if layout.decodes_weights:
        nbytes = max(layout.weights.decoded_offsets(x, layout.item_nbytes)[1] for x in layout.weights.layers)
        yield _region(device, "decoded weights", "weights.decoded", nbytes, 1)
    if nbytes := layout.weights.slot_nbytes(layout.direct):
        for slot in range(WEIGHT_SLOTS):
            yield _region(device, "weight slots", f"weights.slot.{slot}", nbytes, 1)


def _kv(layout: Layout) -> Iterator[Allocation]:
    beside, kv = layout.attention.tier, layout.kv
    for j, row in enumerate(kv.tiles):
        for k, tile in enumerate(row):
            for r in tile.rectangles:
                for part in "kv":
                    yield _region(r.tier, "kv_cache", f"{r.name}.{part}", r.num_units, kv.page_nbytes)
            if tile.tail_rows:
                yield _region(beside, "kv tails", f"kv.{j}.{k}.tail", 2 * len(tile.tail_rows), kv.tail_page_nbytes)
    if layout.decodes_kv:
        units = max(r.num_units for row in kv.tiles for tile in row for r in tile.rectangles)
        yield _region(beside, "decoded kv", "kv.decoded", units, kv.tail_page_nbytes)
    if kv.slot_units:
        for slot in range(KV_SLOTS):
            yield _region(beside, "kv slots", f"kv.slot.{slot}", kv.slot_units, kv.page_nbytes)


def _attention(layout: Layout) -> Iterator[Allocation]:
    """What attention on the host needs besides."""
    device, kv, nbytes = layout.device.name, layout.kv, layout.attention_nbytes(layout.policy.gpu_batch_size)
    if layout.attention.on_host:
        for slot in range(ATTENTION_SLOTS):
            yield _region(layout.attention.tier, "attention slots", layout.attention.host_slot(slot), nbytes, 1)
    if layout.attention.across_link:
        for slot in range(ATTENTION_SLOTS):
            yield _region(device, "attention slots", layout.attention.near_slot(slot), nbytes, 1)
        for slot in range(KV_SLOTS):
            yield _region(device, "prompt slots", f"kv.prompt.{slot}.pages", kv.prompt_units, kv.page_nbytes)
            if kv.tail_units:
                yield _region(device, "prompt slots", f"kv.prompt.{slot}.tails", kv.tail_units, kv.tail_page_nbytes)


def _activations(layout: Layout) -> Iterator[Allocation]:
    hidden = layout.activations
    for parts in hidden.parts:
        for part in parts:
            yield _region(part.tier, "activations", part.name, hidden.units(part), hidden.token_nbytes)
    if hidden.slot_units:
        for slot in range(HIDDEN_SLOTS):
            yield _region(
                layout.device.name, "activation slots", f"hidden.slot.{slot}", hidden.slot_units, hidden.token_nbytes
            )


def _embedding(layout: Layout) -> Iterator[Allocation]:
    for slot in range(EMBED_SLOTS):
        yield _region(
            layout.device.name, "embedding slots", f"embed.slot.{slot}", layout.embed_rows, layout.embed_row_nbytes
        )


def _results(layout: Layout) -> Iterator[Allocation]:
    device, rows = layout.device.name, layout.policy.gpu_batch_size
    for k in range(layout.policy.num_gpu_batches):
        yield _region(device, "results", f"features.{k}", rows, layout.features_nbytes)
        for part, nbytes in CANDIDATE_NBYTES.items():
            yield _region(device, "results", f"candidates.{k}.{part}", rows, nbytes)


def _staging(layout: Layout) -> Iterator[Allocation]:
    if layout.staging is not None and layout.staging_nbytes:
        for slot in range(STAGING_SLOTS):
            yield _region(layout.staging, "staging", f"staging.{slot}", layout.staging_nbytes, 1)
    if layout.staging is not None and layout.stages_rows:
        yield _region(layout.staging, "staging", "staging.embed", layout.embed_rows, layout.embed_row_nbytes)


def _region(tier: str, what: str, name: str, num_units: int, unit_nbytes: int) -> Allocation:
    return Allocation(tier, what, RegionSpec(name=name, num_units=num_units, unit_nbytes=unit_nbytes))
