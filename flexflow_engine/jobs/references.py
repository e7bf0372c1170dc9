"""What names a checkpoint: a folder, a hub id, or `synthetic:` and a published model."""

import re

SYNTHETIC = "synthetic:"
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)


def is_hub_id(reference: str) -> bool:
    """Whether it reads `owner/name`. Whoever means a folder of such a name has found it before."""
    return _HUB_ID.fullmatch(reference) is not None
