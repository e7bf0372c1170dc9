"""What to tell somebody who wrote a name that does not exist."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def near_miss(word: str, known: Iterable[str]) -> str:
    """A clause for `FlexFlowError.fix`: the closest of the known names, and otherwise all of them."""
    names = sorted(known)
    lowered = {name.lower(): name for name in names}
    close = get_close_matches(word.lower(), lowered, n=1)
    if close:
        return f"did you mean `{lowered[close[0]]}`?"
    return f"known: {', '.join(names)}" if names else "none is known"
