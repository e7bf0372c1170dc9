"""Durations, as people read them."""

from __future__ import annotations


def format_duration(seconds: float) -> str:
    """`12.3 s` below a minute, then `2:05` and `1:02:05`."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
