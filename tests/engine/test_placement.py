"""What is asked of a placement is what lies on the tiers, and what a layout promises is what the tiers count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexflow_engine.abc.codec import Codec
from flexflow_engine.abc.policy import TENSOR_CLASSES, Placement, TensorClass
from flexflow_engine.abc.tier import Tier
from flexflow_engine.placement import kv
from flexflow_engine.placement.kv import WHOLE_ROWS, KVLayout, KVTile, place_kv
from flexflow_engine.placement.layout import Layout
from flexflow_engine.placement.memory import allocations, memory_table, placed_bytes
from flexflow_engine.placement.pages import MAX_PAGE_NBYTES, PAGES_PER_LAYER, paged_tensors
from flexflow_engine.placement.weights import Run
from flexflow_plugins.codecs.group_quant import GroupInt4Codec, GroupInt8Codec
from flexflow_plugins.codecs.none import NoneCodec
from flexflow_plugins.models.opt import OPTModel
from harness import policy, random_prompts, run_job, save_opt
from layouts import (
    DEVICE_FAR,
    DEVICE_FAR_DISK,
    DEVICE_HOST_DISK,
    ISLAND_HOST,
    ISLAND_HOST_DISK,
    TIERS,
    disk_setups,
    lay_out,
    opt,
    policies,
    setups,
)

CACHED_TOKENS = 9 + 6 - 1
"""Of the longest prompt and its new tokens, as `lay_out` has them by default."""
PERCENT = (0, 4, 20, 50, 96, 100)
SPLITS = [
    *[pytest.param(DEVICE_FAR, {"device": p, "far": 100 - p}, id=f"{p}-{100 - p}") for p in PERCENT],
    *[
        pytest.param(
            DEVICE_FAR_DISK, {"device": p, "far": rest, "disk": 100 - p - rest}, id=f"{p}-{rest}-{100 - p - rest}"
        )
        for p in PERCENT
        for rest in sorted({0, (100 - p) * 4 // 10, 100 - p})
    ],
]
UNTIED_PROJECTED = {"tie_word_embeddings": False, "word_embed_proj_dim": 32}

Classes = Mapping[str, type[Tier]]


def page_nbytes(layout: Layout) -> dict[TensorClass, int]:
    """The largest unit of placement; a KV page is keys and values, an activation's page is one row."""
    runs = [*(run for layer in layout.weights.layers for run in layer.runs), *layout.weights.table]
    return {
        "weights": max(page.nbytes for run in runs for page in run.pages),
        "kv_cache": 2 * layout.kv.page_nbytes,
        "activations": layout.activations.max_new_tokens * layout.activations.token_nbytes,
    }


def allocated(layout: Layout) -> dict[TensorClass, Counter[str]]:
    """Bytes of the regions that the runtime makes, and of the pages that a disk serves from the store."""
    nbytes: dict[TensorClass, Counter[str]] = {name: Counter() for name in TENSOR_CLASSES}
    for allocation in allocations(layout):
        for name in TENSOR_CLASSES:
            if allocation.what == name:
                nbytes[name][allocation.tier] += allocation.spec.nbytes
    for tier in layout.tiers:
        if tier.reads_store:
            nbytes["weights"][tier.name] = sum(run.nbytes for run in layout.weights.placed(tier.name))
    return nbytes


@pytest.mark.parametrize("config", [{}, UNTIED_PROJECTED], ids=["tied", "untied"])
@pytest.mark.parametrize(("classes", "asked"), SPLITS)
def test_every_class_lies_within_one_page_of_what_was_asked(
    classes: Classes, asked: Mapping[str, float], config: Mapping[str, Any]
) -> None:
    chosen = policy(
        setups(classes), gpu_batch_size=5, num_gpu_batches=3, weights=asked, kv_cache=asked, activations=asked
    )
    layout = lay_out(opt(**config), classes, chosen)
    placed, counted = placed_bytes(layout), allocated(layout)
    for name in TENSOR_CLASSES:
        total = sum(placed[name].values())
        for tier, percent in asked.items():
            assert abs(placed[name][tier] - total * percent / 100) <= page_nbytes(layout)[name], (name, tier)
            assert counted[name][tier] == placed[name][tier], (name, tier)
            assert placed[name][tier] or percent < 5
            assert percent or not placed[name][tier]


@given(st.data(), st.sampled_from(TIERS))
def test_the_regions_hold_every_large_parameter_every_page_and_every_row_once(
    data: st.DataObject, classes: Classes
) -> None:
    layout = lay_out(opt(), classes, data.draw(policies(classes)), prompt_tokens=(9, 5), max_new_tokens=6)
    chosen, counted = layout.policy, allocated(layout)
    pages = -(-14 // chosen.kv_page_tokens)  # 9 of the prompt and 5 generated ones are cached
    rows = chosen.gpu_batch_size * chosen.num_gpu_batches
    tensors = {run.tensor.name: run.tensor for layer in layout.weights.layers for run in layer.runs}
    assert counted["weights"].total() == sum(tensor.nbytes for tensor in tensors.values())
    assert counted["kv_cache"].total() == 3 * rows * pages * page_nbytes(layout)["kv_cache"]
    assert counted["activations"].total() == rows * page_nbytes(layout)["activations"]


@pytest.mark.parametrize("config", [{}, UNTIED_PROJECTED], ids=["tied", "untied"])
def test_pages_cover_every_tensor_without_gap_or_overlap(config: Mapping[str, Any]) -> None:
    classes = DEVICE_FAR_DISK
    chosen = policy(setups(classes), weights={"device": 20, "far": 30, "disk": 50})
    weights = lay_out(opt(**config), classes, chosen).weights
    runs = {run.region: run for layer in weights.layers for run in layer.runs} | {r.region: r for r in weights.table}
    rows: dict[str, list[tuple[int, int]]] = {}
    for run in runs.values():
        rows.setdefault(run.tensor.name, []).append((run.first_row, run.stop_row))
    assert {name for name, _ in _large(config)} == set(rows)
    for name, parts in rows.items():
        ordered = sorted(parts)
        assert [first for first, _ in ordered] == [0, *(stop for _, stop in ordered[:-1])], name
        assert ordered[-1][1] == dict(_large(config))[name]


@pytest.mark.parametrize("codec", [NoneCodec(), GroupInt4Codec()], ids=lambda codec: codec.name)
@pytest.mark.parametrize("size", ["125m", "1.3b", "175b"])
def test_pages_are_sized_as_they_are_encoded(size: str, codec: Codec) -> None:
    model = OPTModel(OPTModel.read_config(OPTModel.published()[f"facebook/opt-{size}"]), "float16")
    tensors = {tensor.name: tensor for tensor in paged_tensors(model, codec, NoneCodec())}
    layer = [tensor for name, tensor in tensors.items() if ".layers.1." in name and tensor.role == "matrix"]
    bound = min(MAX_PAGE_NBYTES, sum(codec.encoded_nbytes(t.shape, "float16") for t in layer) // PAGES_PER_LAYER)
    largest = max(tensor.unit_nbytes for tensor in layer)
    assert bound / 2 < largest <= bound + 64, "no more than what a group is filled up with"


def test_a_table_is_cut_alike_whatever_encodes_it() -> None:
    cuts = {
        (tensor.page_rows, tensor.unit_rows)
        for codec in (NoneCodec(), GroupInt8Codec(), GroupInt4Codec())
        for tensor in paged_tensors(opt(vocab_size=5000), codec, NoneCodec())
        if tensor.role == "table"
    }
    assert len(cuts) == 1


def _large(config: Mapping[str, Any]) -> list[tuple[str, int]]:
    return [(spec.name, spec.shape[0]) for spec in opt(**config).tensors() if spec.role != "small"]


@pytest.mark.parametrize("vocab_size", [300, 5000])
@pytest.mark.parametrize("config", [{}, UNTIED_PROJECTED], ids=["tied", "untied"])
def test_parts_of_the_head_are_no_larger_than_a_decoder_layer(config: Mapping[str, Any], vocab_size: int) -> None:
    model = opt(**config, vocab_size=vocab_size)
    layers = lay_out(model, DEVICE_FAR, policy(setups(DEVICE_FAR), weights={"far": 100})).weights.layers
    nbytes = {
        kind: [sum(r.nbytes for r in x.runs) for x in layers if x.spec.kind == kind] for kind in ("decoder", "head")
    }
    assert max(nbytes["head"]) <= max(nbytes["decoder"])
    assert len(nbytes["head"]) > 1 or vocab_size == 300
    firsts = [layer.first_row for layer in layers if layer.spec.kind == "head"]
    assert firsts == [layer.runs[0].first_row for layer in layers if layer.spec.kind == "head"]


@pytest.mark.parametrize("config", [{}, UNTIED_PROJECTED], ids=["tied", "untied"])
def test_a_table_is_encoded_by_its_own_codec(config: Mapping[str, Any]) -> None:
    codec, classes = GroupInt4Codec(), DEVICE_FAR
    weights = lay_out(opt(**config), classes, policy(setups(classes)), weight_codec=codec).weights
    assert {run.tensor.codec for run in weights.table} == {codec.for_table()}
    kinds = {layer.spec.kind: layer.codec for layer in weights.layers if layer.runs}
    assert kinds["decoder"] == codec
    assert kinds["head"] == (codec if config else codec.for_table())
    assert set(weights.codecs) == {codec, codec.for_table()}


@pytest.mark.parametrize("share", [0, 20, 100])
def test_a_tied_table_is_placed_once_and_shared_with_the_head(share: float) -> None:
    chosen = policy(setups(DEVICE_FAR), weights={"device": share, "far": 100 - share})
    weights = lay_out(opt(), DEVICE_FAR, chosen).weights
    head = [run for layer in weights.layers if layer.spec.kind == "head" for run in layer.runs]
    assert list(weights.table) == head
    regions = [a.spec.name for a in allocations(lay_out(opt(), DEVICE_FAR, chosen))]
    assert max(Counter(regions).values()) == 1
    assert sum(run.stop_row - run.first_row for run in weights.table) == 300


def test_an_untied_table_takes_its_part_of_the_shares() -> None:
    chosen = policy(setups(DEVICE_FAR), weights={"device": 50, "far": 50})
    weights = lay_out(opt(tie_word_embeddings=False), DEVICE_FAR, chosen).weights
    head = {run.tensor.name for layer in weights.layers if layer.spec.kind == "head" for run in layer.runs}
    assert {run.tensor.name for run in weights.table} == {"model.decoder.embed_tokens.weight"}
    assert head == {"lm_head.weight"}
    for name in ("device", "far"):
        assert sum(run.nbytes for run in weights.table if run.tier == name) == pytest.approx(300 * 64 * 2, abs=4096)


@given(st.data(), st.sampled_from(TIERS), st.sampled_from([1, WHOLE_ROWS]))
def test_rectangles_partition_rows_and_pages_of_every_tile(
    data: st.DataObject, classes: Classes, whole_rows: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv, "WHOLE_ROWS", whole_rows)
        layout = lay_out(opt(), classes, data.draw(policies(classes)))
    rows, pages = range(layout.policy.gpu_batch_size), range(-(-CACHED_TOKENS // layout.kv.page_tokens))
    for tile in (tile for layer in layout.kv.tiles for tile in layer):
        for row in rows:
            for page in pages:
                assert [r.holds(row, page) for r in tile.rectangles].count(True) == 1
        assert sum(r.num_units for r in tile.rectangles) == len(rows) * len(pages)
        _check_units(tile)


def test_no_row_of_a_large_gpu_batch_is_cut() -> None:
    """57.2 % of 256 rows are 146.4; the next layer makes up for what is rounded away."""
    cuts = [[(r.tier, r.first_row, r.stop_row) for r in tile.rectangles] for (tile,) in split_cache(WHOLE_ROWS).tiles]
    assert cuts == [[("device", 0, stop), ("far", stop, 256)] for stop in (146, 147, 146)]


def test_a_row_of_a_smaller_one_is_cut_between_two_pages() -> None:
    """57.2 % of 255 rows of 4 pages are 583.4 pages: of row 145 three."""
    (tile,) = split_cache(WHOLE_ROWS - 1).tiles[0]
    cut = [(r.tier, r.first_row, r.stop_row, r.first_page, r.stop_page) for r in tile.rectangles]
    assert cut[1:3] == [("device", 145, 146, 0, 3), ("far", 145, 146, 3, 4)]


def split_cache(rows: int) -> KVLayout:
    """Three layers' cache of one GPU batch, 4 pages a row, 57.2 % of it on the first tier."""
    return place_kv(
        num_layers=3,
        gpu_batch_size=rows,
        num_gpu_batches=1,
        cached_tokens=15,
        page_tokens=4,
        page_nbytes=1,
        tail_page_nbytes=1,
        placement=Placement((("device", 57.2), ("far", 42.8))),
        direct=frozenset({"device"}),
        takes_tokens=frozenset({"device"}),
    )


def _check_units(tile: KVTile) -> None:
    """A region's units are its pages, each once, in the order (page, row); slots of rectangles don't overlap."""
    for r in tile.rectangles:
        units = [
            r.unit(row, page) for page in range(r.first_page, r.stop_page) for row in range(r.first_row, r.stop_row)
        ]
        assert units == list(range(r.num_units))
        assert all(not r.holds(row, r.stop_page) for row in range(r.first_row, r.stop_row))
    taken = [unit for r, offset in tile.slotted for unit in range(offset, offset + 2 * r.num_units)]
    assert taken == list(range(len(taken)))
    assert all(row in tile.tail_rows for r, _ in tile.slotted for row in range(r.first_row, r.stop_row))


@given(st.data(), st.sampled_from(TIERS))
def test_pages_of_a_layer_lie_apart_in_its_slot_and_within_it(data: st.DataObject, classes: Classes) -> None:
    layout = lay_out(opt(), classes, data.draw(policies(classes)))
    slot = layout.weights.slot_nbytes(layout.direct)
    for layer in layout.weights.layers:
        order = layout.weights.page_order(layer, layout.direct)
        ends = [(offset, offset + page.nbytes) for _, page, offset in order]
        assert all(stop <= first for (_, stop), (first, _) in pairwise(ends))
        assert all(stop <= slot for _, stop in ends)
        assert {run.tier for run, _, _ in order}.isdisjoint(layout.direct)
        assert sum(page.nbytes for _, page, _ in order) == sum(_far_nbytes(run, layout) for run in layer.runs)


def _far_nbytes(run: Run, layout: Layout) -> int:
    return 0 if run.tier in layout.direct else run.nbytes


@pytest.mark.parametrize("classes", [DEVICE_FAR, DEVICE_HOST_DISK, DEVICE_FAR_DISK, ISLAND_HOST, ISLAND_HOST_DISK])
@pytest.mark.parametrize("percent", [0, 40, 100])
def test_the_memory_table_is_what_the_tiers_count_at_their_peak(tmp_path: Path, classes: Classes, percent: int) -> None:
    tiers = disk_setups(classes, tmp_path / "disk")
    first, *others = tiers
    asked = {first: float(percent)} | {name: (100 - percent) / len(others) for name in others}
    result = run_job(
        save_opt(tmp_path / "checkpoint", num_hidden_layers=2),
        tiers,
        policy(tiers, weights=asked, kv_cache=asked, activations=asked),
        random_prompts(6, longest=9),
        store=tmp_path / "store",
        max_new_tokens=3,
    )
    table = memory_table(result.layout)
    assert result.peaks == {name: table.peak_bytes(name) for name in tiers}


def test_a_budget_that_is_too_small_is_named() -> None:
    chosen = policy(setups(DEVICE_FAR), weights={"far": 100})
    peak = memory_table(lay_out(opt(), DEVICE_FAR, chosen)).peak_bytes("far")
    assert peak > 0
    assert memory_table(lay_out(opt(), DEVICE_FAR, chosen, budget_bytes=peak - 1)).exceeded[-1] == "far"
