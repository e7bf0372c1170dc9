"""`doctor`: what would keep runs from working here, or make them slow."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flexflow_engine.cli.session import Json, Overrides, load_if_given
from flexflow_engine.errors import FlexFlowError, ProblemsError

if TYPE_CHECKING:
    from flexflow_engine.diagnosis import Finding

HELP_INDENT = 11
"""Columns beyond the widest subject: what would help begins two further to the right than what was found."""


def doctor(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="RECIPE", help="Look at what this recipe asks for; else at all there is.")
    ] = None,
    *,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Tell what would keep runs from working on this machine or make them slow, and what would help."""
    from flexflow_engine.diagnosis import diagnose  # noqa: PLC0415  # torch; --help must not import it

    asked, registry = load_if_given(recipe, overrides)
    findings = list(diagnose(registry, asked))
    told = json.dumps([asdict(finding) for finding in findings], indent=2) if as_json else "\n".join(_lines(findings))
    print(told, flush=True)
    if problems := [_problem(finding) for finding in findings if finding.state == "fails"]:
        raise ProblemsError(problems)


def _lines(findings: Sequence[Finding]) -> Iterator[str]:
    """A line each, and beneath it what would help."""
    width = max(len(finding.about) for finding in findings)
    for finding in findings:
        yield f"{finding.state:<5}  {finding.about:<{width}}  {finding.found}"
        if finding.help:
            yield f"{'':{width + HELP_INDENT}}{finding.help}"


def _problem(finding: Finding) -> FlexFlowError:
    return FlexFlowError(finding.found, where=finding.about, fix=finding.help)
