"""flexflow_engine: language models larger than memory, at the speed of the slowest resource.

Plugins mark their hooks with `hookimpl`; see `flexflow_engine.hookspecs` for the four of them.
"""

import pluggy

hookimpl = pluggy.HookimplMarker("flexflow_engine")

__all__ = ["hookimpl"]
__version__ = "0.1.0"
