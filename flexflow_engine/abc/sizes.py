"""Sizes in messages, as a recipe takes them: `1341MiB` is no less than what is needed, or no more than there is."""

from __future__ import annotations

_UNITS = {"MiB": 2**20, "KiB": 2**10, "B": 1}
LEAST_COUNT = 16
"""Of a unit; a smaller unit is taken for less, so that rounding moves a size by a sixteenth at most."""


def rounded_up(nbytes: int) -> str:
    """For what something needs."""
    unit = _unit(nbytes)
    return f"{-(-nbytes // _UNITS[unit])}{unit}"


def rounded_down(nbytes: int) -> str:
    """For what there is."""
    unit = _unit(nbytes)
    return f"{nbytes // _UNITS[unit]}{unit}"


def _unit(nbytes: int) -> str:
    return next((unit for unit, size in _UNITS.items() if nbytes >= LEAST_COUNT * size), "B")
