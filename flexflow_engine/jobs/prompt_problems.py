"""What is wrong with the lines of a prompt file, told once for all lines that share it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from flexflow_engine.errors import PromptError

MAX_SHOWN = 20
"""Problems of one prompt file that are told; the lines of the rest are counted."""
MAX_RUNS = 4
"""Runs of adjoining lines that are named of one problem."""


def by_problem(found: Mapping[int, PromptError], path: Path) -> Iterator[PromptError]:
    """found: what is wrong, by the lines' numbers, ascending. Equal ones become one, in the order of its first line."""
    lines: dict[tuple[str, str], list[int]] = {}
    for number, error in found.items():
        lines.setdefault((error.what, error.fix), []).append(number)
    shared = list(lines.items())
    for (what, fix), numbers in shared[:MAX_SHOWN]:
        yield PromptError(what, where=f"{path}, {_named(numbers)}", fix=fix)
    if rest := sum(len(numbers) for _, numbers in shared[MAX_SHOWN:]):
        yield PromptError(f"{rest} more lines can't be used", where=str(path))


def _named(numbers: Sequence[int]) -> str:
    """`line 7`, `lines 1 to 3, 7 and 12 more`."""
    runs = _runs(numbers)
    shown = [str(first) if first == last else f"{first} to {last}" for first, last in runs[:MAX_RUNS]]
    rest = sum(last - first + 1 for first, last in runs[MAX_RUNS:])
    return f"line{'s' if len(numbers) > 1 else ''} {', '.join(shown)}{f' and {rest} more' if rest else ''}"


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each run of adjoining numbers."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1] = runs[-1][0], number
        else:
            runs.append((number, number))
    return runs
