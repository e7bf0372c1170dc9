"""The folder of what may be lost: measured machines, digests of files, weights where no disk tier has them, and kernels
where none can be written beside their files.
"""

import os
from pathlib import Path


def user_cache() -> Path:
    """This user's; it need not exist."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "flexflow_engine"
