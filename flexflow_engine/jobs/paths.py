"""Paths as people write them."""

import os
from pathlib import Path


def expand_home(path: str) -> Path:
    """`~` and `~user` replaced by the home folder; a user that does not exist stays a file name."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  # Path.expanduser raises for such a user
