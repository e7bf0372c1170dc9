"""The arithmetic of the benchmarks that judge predictions and the policies of `lp`."""

from __future__ import annotations

from pathlib import Path

import pytest

import prediction
from lp_grid import CONFIGURATIONS, GRID_POLICIES, LP, Policy, Results, hand_policies, spread, verdict
from prediction import JOBS, Load, Result, chosen, error, read_results, table, write_results


def result(job: str, predicted: float, measured: float) -> Result:
    return Result(job=job, predicted=predicted, measured=measured, bound_by="compute", other_load=0.0)


def test_an_error_is_relative_to_what_was_measured() -> None:
    results = [result("a", 12, 10), result("b", 7, 10), result("c", 10, 10)]
    assert [r.error for r in results] == pytest.approx([0.2, -0.3, 0.0])


def test_a_jobs_error_is_the_median_of_its_runs() -> None:
    first, second = JOBS[0].name, JOBS[1].name
    pairs = [(first, 12, 10), (second, 9, 10), (first, 20, 10), (second, 7, 10), (first, 9, 10)]
    results = [result(*pair) for pair in pairs]
    assert error([r for r in results if r.job == first]) == pytest.approx(0.2)
    assert "median error 20.0 %, worst 20.0 %, 2 jobs" in table(results)
    assert "+20, +100, -10" in table(results)


def test_runs_that_are_known_are_not_made_again_unless_asked_for(tmp_path: Path) -> None:
    write_results(tmp_path / "r.json", [result(JOBS[0].name, 1, 2)])
    known = read_results(tmp_path / "r.json")
    assert known == [result(JOBS[0].name, 1, 2)]
    assert chosen([], known, 2) == [*JOBS[1:], *JOBS]
    assert chosen([JOBS[0].name], known, 2) == [JOBS[0], JOBS[0]]
    assert len({job.name for job in JOBS}) == len(JOBS) >= 12


def test_what_others_took_is_all_that_own_processes_did_not() -> None:
    before, after = Load(at_s=10, machine_s=100, children_s=20), Load(at_s=14, machine_s=108, children_s=26)
    assert after.others_since(before) == 0.5


def grid_policy(batch: int) -> Policy:
    return {"plugin": "fixed", "gpu_batch_size": batch, "num_gpu_batches": 1, "weights": {}, "kv_cache": {}}


def test_lp_is_judged_by_what_was_measured_in_turns(tmp_path: Path) -> None:
    """A first figure, however good, only brings a policy among the best."""
    results = Results(tmp_path / "r.json")
    figures = {8: [99.0, 10.0, 12.0, 11.0], 16: [50.0, 20.0, 18.0, 19.0]}
    for batch, speeds in figures.items():
        for speed in speeds:
            results.add("one", grid_policy(batch), speed)
    for speed in (5.0, 19.0, 19.5, 20.0):
        results.add("one", LP, speed)
    found = verdict("one", Results(tmp_path / "r.json"), [grid_policy(8), grid_policy(16)], 21)
    assert found.best.policy == grid_policy(16)
    assert found.ratio == pytest.approx(19.5 / 19.0)
    assert [m.policy for m in results.policies("one")] == [grid_policy(16), grid_policy(8)]


def test_the_grid_covers_its_whole_range_and_says_when_it_can_not() -> None:
    for configuration in CONFIGURATIONS:
        policies = list(hand_policies(list(configuration.tiers)))
        chosen_ones = spread(policies, GRID_POLICIES)
        assert (chosen_ones[0], chosen_ones[-1]) == (policies[0], policies[-1])
        assert len({str(policy) for policy in chosen_ones}) == GRID_POLICIES
    with pytest.raises(SystemExit, match="2 fit, and 3"):
        spread([grid_policy(1), grid_policy(2)], 3)


def test_a_recipe_of_each_job_names_the_tiers_that_it_uses(tmp_path: Path) -> None:
    for job in prediction.JOBS:
        recipe = job.recipe(tmp_path)
        shares = [recipe["scheduler"][name] for name in ("weights", "kv_cache", "activations")]
        assert {tier for share in shares for tier in share} <= set(recipe["tiers"])
        assert all(sum(share.values()) == 100 for share in shares)
