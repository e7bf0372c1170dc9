"""No tier holds more than its budget, and each holds exactly what the memory table said before the run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexflow_engine.abc.dtypes import DType
from flexflow_engine.abc.policy import AttentionPlace, MemoryTable, Policy
from flexflow_engine.abc.sizes import rounded_up
from flexflow_engine.abc.tier import Tier
from flexflow_engine.errors import TierError
from flexflow_engine.placement.layout import Layout
from flexflow_engine.placement.memory import memory_table, placed_bytes
from flexflow_plugins.models.opt import OPTModel
from harness import TierSetup, policy, random_prompts, run_job, save_opt
from layouts import (
    DEVICE_FAR_DISK,
    DEVICE_HOST_DISK,
    ISLAND_HOST_DISK,
    TIERS,
    disk_setups,
    lay_out,
    opt,
    policies,
)

PROMPTS = random_prompts(7, seed=2, longest=20)
MAX_NEW_TOKENS = 5
PERCENT = (0.0, 4.0, 20.0, 50.0, 96.0, 100.0)


class Jobs:
    """One checkpoint, and jobs on it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._checkpoint = save_opt(root / "checkpoint", vocab_size=VOCABULARY)

    def budgeted(self, table: MemoryTable, classes: Mapping[str, type[Tier]], **change: int) -> dict[str, TierSetup]:
        """Tiers with exactly the budgets that the table asks for, and a byte on the tiers that it asks nothing of."""
        return {
            name: TierSetup(
                setup.tier_class, max(table.peak_bytes(name), 1) + change.get(name, 0), options=setup.options
            )
            for name, setup in disk_setups(classes, self._root / "disk").items()
        }

    def run(self, tiers: Mapping[str, TierSetup], chosen: Policy, dtype: DType = "float32") -> dict[str, int]:
        """The tiers' peaks."""
        return run_job(
            self._checkpoint,
            tiers,
            chosen,
            PROMPTS,
            store=self._root / "store",
            max_new_tokens=MAX_NEW_TOKENS,
            dtype=dtype,
        ).peaks


VOCABULARY = 307
"""Pages do not divide it evenly."""


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(tmp_path_factory.mktemp("memory"))


def planned(model: OPTModel, classes: Mapping[str, type[Tier]], chosen: Policy) -> Layout:
    lengths = [len(prompt) for prompt in PROMPTS]
    return lay_out(model, classes, chosen, prompt_tokens=lengths, max_new_tokens=MAX_NEW_TOKENS)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_tier_s_peak_is_what_the_memory_table_says(jobs: Jobs, data: st.DataObject) -> None:
    """The budgets are exactly the table's: the tiers themselves refuse a byte more."""
    classes = data.draw(st.sampled_from(TIERS), label="tiers")
    chosen: Policy = data.draw(policies(classes), label="policy")
    dtype: DType = data.draw(st.sampled_from(["float32", "bfloat16"]), label="dtype")
    table = memory_table(planned(opt(dtype=dtype, vocab_size=VOCABULARY), classes, chosen))
    peaks = jobs.run(jobs.budgeted(table, classes), chosen, dtype)
    assert peaks == {name: table.peak_bytes(name) for name in classes}


@pytest.mark.parametrize("attention", ["device", "host"])
@pytest.mark.parametrize("classes", [DEVICE_HOST_DISK, DEVICE_FAR_DISK, ISLAND_HOST_DISK], ids=list)
def test_a_tier_that_lacks_one_byte_refuses(
    jobs: Jobs, classes: Mapping[str, type[Tier]], attention: AttentionPlace
) -> None:
    shares = dict(zip(classes, (30.0, 30.0, 40.0), strict=True))
    kv_cache = shares if attention == "device" else dict(zip(classes, (0.0, 60.0, 40.0), strict=True))
    tiers = disk_setups(classes, Path())
    chosen = policy(tiers, weights=shares, kv_cache=kv_cache, activations=shares, attention=attention)
    table = memory_table(planned(opt(vocab_size=VOCABULARY), classes, chosen))
    for name in classes:
        needed = rounded_up(table.peak_bytes(name))
        with pytest.raises(TierError, match=rf"tiers\.{name}: .*a budget of {needed} would do"):
            jobs.run(jobs.budgeted(table, classes, **{name: -1}), chosen)


@pytest.mark.parametrize("tensor_class", ["weights", "kv_cache", "activations"])
@pytest.mark.parametrize("percent", PERCENT)
def test_a_share_lies_where_it_was_asked_for_within_a_page(tensor_class: str, percent: float) -> None:
    for tier, rest in (("device", "host"), ("host", "disk"), ("disk", "device")):
        shares = {tier: percent, rest: 100.0 - percent}
        chosen = policy(
            disk_setups(DEVICE_HOST_DISK, Path()),
            gpu_batch_size=3,
            weights=shares if tensor_class == "weights" else None,
            kv_cache=shares if tensor_class == "kv_cache" else None,
            activations=shares if tensor_class == "activations" else None,
        )
        layout = planned(opt(vocab_size=VOCABULARY), DEVICE_HOST_DISK, chosen)
        placed = {str(name): by_tier for name, by_tier in placed_bytes(layout).items()}[tensor_class]
        assert placed[tier] == pytest.approx(sum(placed.values()) * percent / 100, abs=page_bytes(layout, tensor_class))


def page_bytes(layout: Layout, tensor_class: str) -> int:
    """The unit of placement: a page of weights, one page of keys and one of values, a row's activations."""
    if tensor_class == "weights":
        return max(page.nbytes for layer in layout.weights.layers for run in layer.runs for page in run.pages)
    if tensor_class == "kv_cache":
        return 2 * layout.kv.page_nbytes
    return layout.activations.max_new_tokens * layout.activations.token_nbytes
