"""Prices of tasks, and their sums over steps, against figures worked out from the formulas."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import replace

import pytest

from flexflow_engine.abc.codec import Codec
from flexflow_engine.abc.hardware import Curve, HardwareProfile, Processor, ProductRates
from flexflow_engine.abc.policy import AttentionPlace, Policy, WorkloadShape
from flexflow_engine.abc.prediction import StepShape
from flexflow_engine.abc.step import RowStep
from flexflow_engine.abc.tier import Tier
from flexflow_engine.errors import HardwareError
from flexflow_engine.graph.task import (
    Attend,
    AttentionInputs,
    AttentionOutput,
    Compute,
    DecodeWeights,
    FetchTokens,
    Task,
)
from flexflow_engine.placement.laying_out import make_layout
from flexflow_engine.placement.layout import Layout
from flexflow_engine.placement.pages import paged_tensors
from flexflow_engine.planning.arithmetic import Arithmetic
from flexflow_engine.planning.attention_costs import AttentionCosts
from flexflow_engine.planning.cost import CostModel, distinct
from flexflow_engine.planning.plan import describe_tiers
from flexflow_engine.planning.step_costs import StepCostModel
from flexflow_plugins.codecs.group_quant import GroupInt4Codec
from flexflow_plugins.codecs.none import NoneCodec
from flexflow_plugins.models.opt import OPTModel
from harness import policy
from layouts import DEVICE_FAR_DISK, DEVICE_HOST_DISK, ISLAND_HOST_DISK, compile_steps, compose, lay_out, opt, setups
from profiles import link, processor, profile

PROMPTS = (8, 8, 8, 8)


def cost_model(layout: Layout, machine: HardwareProfile, model: OPTModel | None = None) -> CostModel:
    return CostModel(layout, model or opt(), NoneCodec(), machine)


def far_policy(weights: dict[str, float] | None = None) -> Policy:
    return policy(setups(DEVICE_FAR_DISK), gpu_batch_size=2, num_gpu_batches=2, weights=weights)


def tasks_of(layout: Layout, *, steps: int = 3, max_new_tokens: int = 6) -> list[Task]:
    graphs = compile_steps(layout, compose(layout, PROMPTS, max_new_tokens, limit=steps))
    return [task for graph in graphs for task in graph.tasks]


def rows(count: int, *, new_tokens: int = 1, context: int = 0) -> list[RowStep]:
    return [RowStep(row=r, sequence=r, new_tokens=new_tokens, context=context) for r in range(count)]


def test_a_layer_costs_the_same_in_three_parts_on_processors_alike() -> None:
    """Attention on the host is priced by the host's processor; the parts beside it by the compute tier's."""
    machine = profile()
    layouts = [
        lay_out(
            opt(),
            ISLAND_HOST_DISK,
            policy(setups(ISLAND_HOST_DISK), gpu_batch_size=2, kv_cache={"host": 100}, attention=place),
            prompt_tokens=PROMPTS,
        )
        for place in ("device", "host")
    ]
    whole, parts = (
        [(t, cost_model(layout, machine).work(t)) for t in tasks_of(layout) if t.tile.layer == 1 and t.tile.step == 1]
        for layout in layouts
    )
    (expected,) = {work.shared_s for task, work in whole if isinstance(task.operation, Compute)}
    kinds = (AttentionInputs, Attend, AttentionOutput)
    seconds = [work.shared_s for task, work in parts if isinstance(task.operation, kinds) and not task.tile.gpu_batch]
    assert len(seconds) == 3
    assert min(seconds) > 0
    assert sum(seconds) == pytest.approx(expected)
    (attend,) = (task for task, _ in parts if isinstance(task.operation, Attend) and not task.tile.gpu_batch)
    slow = replace(machine, processors={**machine.processors, "cpu": processor(task_s=7.0)})
    assert cost_model(layouts[1], slow).work(attend).fixed_s == 7.0


def test_a_transfer_takes_its_moves_latencies_and_its_bytes() -> None:
    layout = lay_out(opt(), DEVICE_FAR_DISK, far_policy(weights={"far": 100}), prompt_tokens=PROMPTS)
    costs = cost_model(layout, profile(links={"throttled": link(2e6, latency_s=0.5)}))
    loads = [
        task for task in tasks_of(layout) if task.lane == "far.read" and task.key.rpartition("/")[2][0:4] == "load"
    ]
    assert loads
    for task in loads:
        assert costs.work(task).fixed_s == 0.5
        assert costs.work(task).seconds == pytest.approx(0.5 + task.nbytes / 2e6)


def test_rows_of_a_far_table_are_looked_up_one_by_one() -> None:
    layout = lay_out(opt(), DEVICE_FAR_DISK, far_policy(weights={"far": 100}), prompt_tokens=PROMPTS)
    machine = profile(links={"throttled": link(1e6, latency_s=0.25)}, gather_row_s=0.75)
    gathers = [task for task in tasks_of(layout, steps=1) if "gather" in task.key]
    (table,) = layout.weights.table
    for task in gathers:
        units = distinct(table.num_units, 16)
        assert cost_model(layout, machine).work(task).seconds == pytest.approx(units + 16 * 64 * 4 / 1e6)


def test_each_tier_of_a_table_hands_over_its_share_of_the_rows() -> None:
    model, chosen = opt(vocab_size=40_000), far_policy(weights={"far": 50, "disk": 50})
    layout = lay_out(model, DEVICE_FAR_DISK, chosen, prompt_tokens=PROMPTS)
    gathers = [task for task in tasks_of(layout, steps=1) if "gather" in task.key and task.tile.gpu_batch == 0]
    nbytes = {task.lane: task.nbytes for task in gathers}
    assert set(nbytes) == {"far.read", "disk.read"}
    assert sum(nbytes.values()) == pytest.approx(16 * 64 * 4, abs=1)
    rows = Counter[str]()
    for run in layout.weights.table:
        rows[f"{run.tier}.read"] += run.rows
    assert nbytes["far.read"] / nbytes["disk.read"] == pytest.approx(rows["far.read"] / rows["disk.read"], rel=0.01)


def test_so_many_draws_meet_so_many_units() -> None:
    assert distinct(1, 5) == 1
    assert distinct(0, 5) == 0
    assert distinct(10, 1) == pytest.approx(1)
    assert distinct(2, 2) == pytest.approx(1.5)


def test_a_decoder_layers_prompt_costs_its_matmuls_vectors_scores_and_cache() -> None:
    """hidden 64, feed-forward 256, 2 prompts of 8 tokens, a million of everything a second."""
    layout = lay_out(opt(), DEVICE_FAR_DISK, far_policy(), prompt_tokens=PROMPTS)
    costs = cost_model(layout, profile(cpu=processor(task_s=3.0, layer_s=2.0, product_s=0.5)))
    task = next(t for t in tasks_of(layout) if isinstance(t.operation, Compute) and t.tile.layer == 1)
    matmul = 2 * (4 * 64 * 64 + 2 * 64 * 256) * 16
    vectors = 16 * (2 * (5 * 64 + 256) + 6 * 64) * 4
    scores = 2 * (2 * 8 * 9 * 64)
    cached = 2 * 16 * 2 * 64 * 4
    assert costs.work(task).fixed_s == 5.0
    assert costs.work(task).shared_s == pytest.approx(6 * 0.5 + (matmul + vectors + scores + cached) / 1e6)


@pytest.mark.parametrize(("far", "shared"), [(0, True), (50, False)])
def test_torchs_threads_share_products_where_nothing_is_moved(far: int, shared: bool) -> None:
    """Of a decoder layer with 16 tokens: at twice the rate, and half of what each product takes."""
    layout = lay_out(opt(), DEVICE_FAR_DISK, far_policy({"device": 100 - far, "far": far}), prompt_tokens=PROMPTS)
    team = ProductRates(matmul_flops_per_s=Curve(((1.0, 2e6),)), product_s=0.25)
    cpu = processor(product_s=0.5)
    task = next(t for t in tasks_of(layout) if isinstance(t.operation, Compute) and t.tile.layer == 1)
    alone, in_a_team = (
        cost_model(layout, profile(cpu=way)).work(task).seconds
        for way in (cpu, replace(cpu, torch_team={"float32": team}))
    )
    operations = 2 * (4 * 64 * 64 + 2 * 64 * 256) * 16
    assert alone - in_a_team == pytest.approx(6 * 0.25 + operations / 2e6 if shared else 0)


def test_a_decoder_layers_token_reads_what_is_cached() -> None:
    layout = lay_out(opt(), DEVICE_FAR_DISK, far_policy(), prompt_tokens=PROMPTS)
    task = next(
        t for t in tasks_of(layout) if isinstance(t.operation, Compute) and t.tile.step == 2 and t.tile.layer == 1
    )
    matmul = 2 * (4 * 64 * 64 + 2 * 64 * 256) * 2
    vectors = 2 * (2 * (5 * 64 + 256) + 6 * 64) * 4
    read = 2 * 10 * 2 * 64 * 4
    assert cost_model(layout, profile()).work(task).seconds == pytest.approx((matmul + vectors + read) / 1e6)


def test_the_head_computes_last_tokens_only() -> None:
    layout = lay_out(opt(), DEVICE_FAR_DISK, far_policy(), prompt_tokens=PROMPTS)
    heads = {layer.index for layer in layout.weights.layers if layer.spec.kind == "head"}
    tasks = [t for t in tasks_of(layout, steps=1) if isinstance(t.operation, Compute) and t.tile.layer in heads]
    seconds = sum(cost_model(layout, profile()).work(task).seconds for task in tasks)
    assert seconds == pytest.approx(4 * (2 * 300 * 64 + (2 * 300 + 6 * 64 * len(heads)) * 4) / 1e6)


class CodecWithoutKernels(GroupInt4Codec):
    decodes_in_kernels = False

    def for_table(self) -> CodecWithoutKernels:
        return self


def encoded_layout(model: OPTModel, codec: Codec) -> Layout:
    return make_layout(
        model=model,
        tensors=paged_tensors(model, codec, NoneCodec()),
        kv_codec=NoneCodec(),
        policy=far_policy(weights={"far": 100}),
        workload=WorkloadShape(PROMPTS, (6,) * len(PROMPTS)),
        tiers=describe_tiers(DEVICE_FAR_DISK, dict.fromkeys(DEVICE_FAR_DISK, 2**30)),
    )


def test_weights_that_are_multiplied_as_encoded_are_decoded_with_every_tile() -> None:
    model = opt(dtype="float16")
    layout, plain = encoded_layout(model, GroupInt4Codec()), encoded_layout(model, NoneCodec())
    assert not [t for t in tasks_of(layout) if isinstance(t.operation, DecodeWeights)]
    tiles = [t for t in tasks_of(layout) if isinstance(t.operation, Compute) and t.tile.layer == 1]
    with_codec, without = (CostModel(x, model, NoneCodec(), profile()) for x in (layout, plain))
    for tile in tiles:
        decoding = with_codec.work(tile).seconds - without.work(tile).seconds
        assert decoding == pytest.approx((4 * 64 * 64 + 2 * 64 * 256) / 2e6)


def test_decoding_goes_by_numbers_and_needs_the_codecs_rate() -> None:
    model, codec = opt(dtype="float16"), CodecWithoutKernels()
    layout = encoded_layout(model, codec)
    tasks = [t for t in tasks_of(layout) if isinstance(t.operation, DecodeWeights) and t.tile.layer == 1]
    costs = CostModel(layout, model, NoneCodec(), profile())
    assert [costs.work(task).seconds for task in tasks] == pytest.approx([(4 * 64 * 64 + 2 * 64 * 256) / 2e6] * 3)
    without = replace(profile(), processors={"cpu": replace(processor(), codecs={})})
    with pytest.raises(HardwareError, match="no rates of the codec group-int4"):
        CostModel(layout, model, NoneCodec(), without).work(tasks[0])


@pytest.mark.parametrize("codec", [NoneCodec(), GroupInt4Codec()])
def test_an_encoded_cache_is_decoded_unless_attention_reads_it_as_it_is(codec: Codec) -> None:
    numbers = 2 * 20 * 2 * 64
    known = processor()
    rates = {"none": known.decode_attention_bytes_per_s["none"]}
    fused = replace(known, decode_attention_bytes_per_s=rates | {"group-int4": rates["none"]})
    config = opt().config
    plain = Arithmetic(known, config, "float32", codec).token_attention(rows(2, context=19))
    in_place = Arithmetic(fused, config, "float32", codec).token_attention(rows(2, context=19))
    encoded = codec.name != "none"
    assert plain == pytest.approx(numbers * 4 / 1e6 + (numbers / 2e6 if encoded else 0))
    assert in_place == pytest.approx(numbers * (4.5 / 8 if encoded else 4) / 1e6)


def test_sampled_tokens_cost_a_call() -> None:
    layout = lay_out(opt(), DEVICE_FAR_DISK, far_policy(), prompt_tokens=PROMPTS)
    costs = cost_model(layout, profile(cpu=processor(task_s=0.125)))
    fetches = [
        costs.work(task).seconds for task in tasks_of(layout, steps=1) if isinstance(task.operation, FetchTokens)
    ]
    assert fetches == [0.125, 0.125]


def test_a_dtype_without_a_rate_is_named() -> None:
    layout = lay_out(opt(dtype="bfloat16"), DEVICE_FAR_DISK, far_policy(), prompt_tokens=PROMPTS)
    with pytest.raises(HardwareError, match=r"no matmul rate for bfloat16.*known: float32, float16"):
        cost_model(layout, profile(), opt(dtype="bfloat16"))


@pytest.mark.parametrize(
    ("classes", "attention", "cache"),
    [
        (DEVICE_FAR_DISK, "device", "disk"),
        (ISLAND_HOST_DISK, "device", "disk"),
        (ISLAND_HOST_DISK, "host", "host"),
        (ISLAND_HOST_DISK, "host", "disk"),
        (DEVICE_HOST_DISK, "host", "disk"),
    ],
)
@pytest.mark.parametrize("step", [0, 2], ids=["prefill", "decode"])
@pytest.mark.parametrize("weight_codec", [NoneCodec(), GroupInt4Codec()], ids=lambda codec: codec.name)
def test_the_closed_form_of_a_step_is_the_sum_of_its_tasks(
    classes: Mapping[str, type[Tier]], attention: AttentionPlace, cache: str, weight_codec: Codec, step: int
) -> None:
    """Every tensor class on one tier, so that there are no fractions of pages; lanes are as wide as they are."""
    model, tiers = opt(), list(classes)
    machine = profile(
        links={"zarr": link(3e6), "pinned": link(2e6)},
        cpu=processor(task_s=0.1, layer_s=0.2, product_s=0.05),
        gather_row_s=0.01,
    )
    chosen = policy(
        setups(classes),
        gpu_batch_size=2,
        num_gpu_batches=2,
        weights={tiers[1]: 100},
        kv_cache={cache: 100},
        activations={tiers[1]: 100},
        attention=attention,
    )
    layout = lay_out(model, classes, chosen, prompt_tokens=PROMPTS, weight_codec=weight_codec)
    summed: dict[str, float] = defaultdict(float)
    for task in tasks_of(layout):
        if task.tile.step == step and task.lane != "tokens":
            work = cost_model(layout, machine).work(task)
            summed[task.lane] += work.seconds
    closed = StepCostModel(
        model=model,
        tensors=paged_tensors(model, weight_codec, NoneCodec()),
        kv_codec=NoneCodec(),
        tiers=layout.tiers,
        profile=machine,
    ).costs(
        StepShape(
            phase="decode" if step else "prefill",
            gpu_batch_size=2,
            num_gpu_batches=2,
            context=9 if step else 8,
            attention=attention,
            kv_page_tokens=4,
        )
    )
    lanes = closed.seconds(chosen)
    if step and cache == "disk":  # full in every fourth step, which takes `layer_s`; the closed form spreads that out
        lanes["attention" if attention == "host" else "compute"] -= model.config.num_layers * 2 * 0.2 / 4
    assert lanes["compute"] == pytest.approx(summed["compute"], rel=0.15)  # the head is cut into parts
    for lane, seconds in summed.items():
        if "write" not in lane or not step:  # pages are written when they are full; the closed form spreads that out
            assert lanes[lane] == pytest.approx(seconds, rel=0.15), lane


def test_an_encoded_cache_is_encoded_page_by_page() -> None:
    """Prompts of 8 and pages of 4 tokens: two rows' fourth generated tokens fill pages, half a million numbers a
    second. The closed form spreads that over the steps.
    """
    chosen = policy(setups(DEVICE_FAR_DISK), gpu_batch_size=2, num_gpu_batches=2)
    codec, model = GroupInt4Codec(), opt()
    layout = lay_out(model, DEVICE_FAR_DISK, chosen, prompt_tokens=PROMPTS, kv_codec=codec)
    tasks = [t for t in tasks_of(layout, steps=6) if isinstance(t.operation, Compute) and t.tile.layer == 1]
    filling, others = ([t for t in tasks if t.tile.gpu_batch == 0 and t.tile.step in steps] for steps in ((4,), (3, 5)))
    costs = CostModel(layout, model, codec, profile())
    before, after = (costs.work(task).seconds for task in others)
    assert costs.work(filling[0]).seconds - (before + after) / 2 == pytest.approx(2 * 4 * 2 * 64 / 0.5e6)
    shape = StepShape(
        phase="decode", gpu_batch_size=2, num_gpu_batches=2, context=10, attention="device", kv_page_tokens=4
    )
    tiers = describe_tiers(DEVICE_FAR_DISK, dict.fromkeys(DEVICE_FAR_DISK, 2**30))
    encoded, free = (
        AttentionCosts(model, codec, tiers, profile(cpu=cpu)).tile_s(shape)
        for cpu in (processor(), _encoding_for_nothing(processor()))
    )
    assert encoded - free == pytest.approx(2 * 2 * 64 / 0.5e6)


def _encoding_for_nothing(cpu: Processor) -> Processor:
    return replace(cpu, codecs={name: replace(rates, encode_values_per_s=1e30) for name, rates in cpu.codecs.items()})


def test_the_closed_form_of_a_step_that_only_computes_is_by_torchs_threads_where_they_are_faster() -> None:
    team = ProductRates(matmul_flops_per_s=Curve(((1.0, 4e6),)), product_s=0.01)
    machine = profile(cpu=replace(processor(task_s=0.1, product_s=0.05), torch_team={"float32": team}))
    chosen, model, none = far_policy(), opt(), NoneCodec()
    layout = lay_out(model, DEVICE_FAR_DISK, chosen, prompt_tokens=PROMPTS)
    costs = cost_model(layout, machine)
    summed = sum(costs.work(t).seconds for t in tasks_of(layout) if t.tile.step == 2 and t.lane == "compute")
    shape = StepShape(
        phase="decode", gpu_batch_size=2, num_gpu_batches=2, context=9, attention="device", kv_page_tokens=4
    )
    closed = StepCostModel(
        model=model, tensors=paged_tensors(model, none, none), kv_codec=none, tiers=layout.tiers, profile=machine
    ).costs(shape)
    assert closed.seconds(chosen)["compute"] == pytest.approx(summed, rel=0.15)  # the head is cut into parts
    assert closed.always["compute"] > 1.5 * summed


@pytest.mark.parametrize("cache", ["device", "disk"])
def test_full_pages_take_a_layers_calls_once_more_where_they_leave_their_tails(cache: str) -> None:
    """Prompts of 8 and pages of 4 tokens: the fourth generated token fills a page."""
    chosen = policy(setups(DEVICE_FAR_DISK), gpu_batch_size=2, num_gpu_batches=2, kv_cache={cache: 100})
    layout = lay_out(opt(), DEVICE_FAR_DISK, chosen, prompt_tokens=PROMPTS)
    costs = cost_model(layout, profile(cpu=processor(task_s=3.0, layer_s=2.0)))
    fixed = {
        task.tile.step: costs.work(task).fixed_s
        for task in tasks_of(layout, steps=6)
        if isinstance(task.operation, Compute) and task.tile.layer == 1
    }
    assert fixed == {0: 5.0, 1: 5.0, 2: 5.0, 3: 5.0, 4: 7.0 if cache == "disk" else 5.0, 5: 5.0}
