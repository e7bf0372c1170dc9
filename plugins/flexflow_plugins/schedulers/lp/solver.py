"""PuLP's solvers: HiGHS where it is installed, CBC otherwise. Written for PuLP 3.3 and 4 alike."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pulp

from flexflow_engine.errors import PluginError

SOLVERS = ("HiGHS", "COIN_CMD", "PULP_CBC_CMD")
"""The preferred first. PuLP 3 brings the last one along, PuLP 4 none."""
OPTIMAL = 1
"""PuLP's status code, in all versions."""
RELATIVE_GAP = 1e-3
"""Whole percentages are good enough when they are proven to be this near to the best ones."""


def solve(problem: pulp.LpProblem, solver: str) -> bool:
    """Solve it, and say whether there is a solution; variables then have their values. Nothing is printed."""
    with warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore", DeprecationWarning)  # PuLP 3.3.2 says of its own CBC that PuLP 4 has none
        outcome = problem.solve(pulp.getSolver(solver, msg=False, gapRel=RELATIVE_GAP, threads=1))
    status = getattr(outcome, "status", outcome)  # PuLP 4 returns statistics, PuLP 3 the code itself
    return int(status) == OPTIMAL


def find_solver() -> str:
    """The name under which PuLP knows the solver. Raises PluginError when there is none."""
    installed = available()
    found = next((name for name in SOLVERS if name in installed), None)
    if found is None:
        raise PluginError(
            "PuLP finds no solver", where="scheduler.plugin: lp", fix="`pip install highspy`, or put `cbc` on the PATH"
        )
    return found


def check_solver() -> None:
    """Solve the smallest of problems. Raises PluginError when there is no solver, or it does not run."""
    solver = find_solver()
    problem = pulp.LpProblem("smallest", pulp.LpMinimize)
    problem += problem.add_variable("share", 0, 1)
    try:
        solved = solve(problem, solver)
    except (pulp.PulpError, OSError) as error:
        raise PluginError(f"the solver {solver} does not run ({error})", fix="`pip install highspy`") from error
    if not solved:
        raise PluginError(f"the solver {solver} finds no solution where there is one", fix="`pip install highspy`")


def available() -> frozenset[str]:
    """Names of the solvers that PuLP finds on this machine."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the same
        return frozenset(pulp.listSolvers(onlyAvailable=True))


@contextmanager
def _quiet() -> Iterator[None]:
    """HiGHS prints its licence when it is first made, past Python, whatever it is told."""
    sys.stdout.flush()
    stdout, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(nowhere)
