"""Sizes in bytes, as people write and read them.

`format_size` is for people who compare. `rounded_up` and `rounded_down` are for refusals: what they write stands in a
recipe as it is, and `1341MiB` is no less than what is needed, or no more than there is.
"""

from __future__ import annotations

import re
from decimal import Decimal

UNITS = {
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
LEAST_COUNT = 16
"""Of a unit; a smaller unit is taken for less, so that rounding moves a size by a sixteenth at most."""
_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?) ?(?P<unit>[A-Za-z]*)", re.ASCII)


def parse_size(value: object) -> int:
    """Bytes of `15GiB`, `1.5GB`, `512 MiB` or a plain whole number. Raises ValueError saying what would do."""
    size = value if isinstance(value, int) and not isinstance(value, bool) else _parse_text(value)
    if size <= 0:
        raise ValueError(f"a size must be more than 0, not {value!r}")
    return size


def format_size(nbytes: float) -> str:
    """`1.5 GiB`: three digits or so, for people."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if abs(nbytes) >= UNITS[unit]:
            return f"{nbytes / UNITS[unit]:.1f} {unit}"
    return f"{nbytes:.0f} B"


def rounded_up(nbytes: int) -> str:
    """For what something needs."""
    unit = _counted_in(nbytes)
    return f"{-(-nbytes // UNITS[unit])}{unit}"


def rounded_down(nbytes: int) -> str:
    """For what there is."""
    unit = _counted_in(nbytes)
    return f"{nbytes // UNITS[unit]}{unit}"


def _counted_in(nbytes: int) -> str:
    return next((unit for unit in ("MiB", "KiB") if nbytes >= LEAST_COUNT * UNITS[unit]), "B")


def _parse_text(value: object) -> int:
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    unit = match["unit"] or "B" if match else ""
    if match is None or unit not in UNITS:
        raise ValueError(f"{value!r} is not a size; {_advice(match)}")
    return int(Decimal(match["number"]) * UNITS[unit])


def _advice(match: re.Match[str] | None) -> str:
    if match:
        for unit in reversed(UNITS):
            if match["unit"].lower() in (unit.lower(), unit[0].lower()):
                return f"did you mean {match['number']}{unit}?"
    return "write 15GiB, 512MiB, 1.5GB or a whole number of bytes"
