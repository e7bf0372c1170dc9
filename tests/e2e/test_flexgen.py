"""FlexGen's policies on FlexGen's machine: predictions lie between what FlexGen reached and what the lanes allow.

The rows of OPT-175B are left to benchmarks/flexgen_table.py, which takes a minute.
"""

from __future__ import annotations

import pytest

from flexflow_engine.planning.clock import VirtualSequential
from flexflow_engine.plugins import Registry
from flexgen_table import BEST, ROWS, Row, predict, predict_chosen

SMALLER = [row for row in ROWS if row.model != "opt-175b"]


@pytest.mark.parametrize("row", SMALLER, ids=lambda row: f"{row.model} {row.what}")
def test_a_published_policy_is_predicted_between_its_measurement_and_its_bound(row: Row) -> None:
    prediction = predict(row, Registry.load()).prediction
    if row.executor is VirtualSequential:
        assert prediction.tokens_per_s == pytest.approx(row.published, rel=0.2)
    else:
        bound = prediction.generated_tokens / prediction.lanes[prediction.bound_by].busy_s
        assert row.published <= prediction.tokens_per_s <= bound


@pytest.mark.parametrize("row", [row for row in BEST if row.model == "opt-6.7b"], ids=lambda row: row.what)
def test_what_lp_chooses_is_predicted_no_slower_than_the_published_policy(row: Row) -> None:
    registry = Registry.load()
    chosen = predict_chosen(row, registry).prediction.tokens_per_s
    assert chosen >= predict(row, registry).prediction.tokens_per_s * (1 - 1e-6)
