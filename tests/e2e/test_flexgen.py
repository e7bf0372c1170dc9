"""FlexGen's policies on FlexGen's machine: predictions lie between what FlexGen reached and what the lanes allow.

The rows of OPT-175B are left to benchmarks/flexgen_table.py, which takes a minute.
"""

from __future__ import annotations

import pytest

from flexflow_engine.errors import PolicyError
from flexflow_engine.planning.clock import VirtualSequential
from flexflow_engine.plugins import Registry
from flexgen_table import ROWS, Row, predict

SMALLER = [row for row in ROWS if row.model != "opt-175b"]


@pytest.mark.parametrize("row", SMALLER, ids=lambda row: f"{row.model} {row.what}")
def test_a_published_policy_is_predicted_between_its_measurement_and_its_bound(row: Row) -> None:
    try:
        prediction = predict(row, Registry.load()).prediction
    except PolicyError as error:
        pytest.skip(error.what)
    if row.executor is VirtualSequential:
        assert prediction.tokens_per_s == pytest.approx(row.published, rel=0.2)
    else:
        bound = prediction.generated_tokens / prediction.lanes[prediction.bound_by].busy_s
        assert row.published <= prediction.tokens_per_s <= bound
