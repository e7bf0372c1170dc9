"""The four hooks of the engine.

Each takes nothing, returns classes, and is called once, when the registry is built; never while a job runs.
"""

import pluggy

from flexflow_engine.abc.codec import Codec
from flexflow_engine.abc.model import Model
from flexflow_engine.abc.scheduler import Scheduler
from flexflow_engine.abc.tier import Tier

NAME = "flexflow_engine"
"""Project name, hook marker and entry-point group."""

hookspec = pluggy.HookspecMarker(NAME)


@hookspec
def flexflow_register_tiers() -> list[type[Tier]]:  # type: ignore[empty-body]  # pluggy never runs a specification
    """Tier classes, each with a unique `name`. Called when the registry is built."""


@hookspec
def flexflow_register_codecs() -> list[type[Codec]]:  # type: ignore[empty-body]  # pluggy never runs a specification
    """Codec classes, each with a unique `name`. Called when the registry is built."""


@hookspec
def flexflow_register_models() -> list[type[Model]]:  # type: ignore[empty-body]  # pluggy never runs a specification
    """Model classes, each with a unique `name`. Called when the registry is built."""


@hookspec
def flexflow_register_schedulers() -> list[type[Scheduler]]:  # type: ignore[empty-body]  # pluggy never runs a specification
    """Scheduler classes, each with a unique `name`. Called when the registry is built."""
