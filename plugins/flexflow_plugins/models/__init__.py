"""Built-in models."""

from flexflow_engine import hookimpl
from flexflow_engine.abc.model import Model
from flexflow_plugins.models.opt import OPTModel


@hookimpl
def flexflow_register_models() -> list[type[Model]]:
    return [OPTModel]
