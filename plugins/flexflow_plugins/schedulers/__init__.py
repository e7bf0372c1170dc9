"""Built-in schedulers."""

from flexflow_engine import hookimpl
from flexflow_engine.abc.scheduler import Scheduler
from flexflow_plugins.schedulers.fixed import FixedScheduler
from flexflow_plugins.schedulers.lp import LPScheduler


@hookimpl
def flexflow_register_schedulers() -> list[type[Scheduler]]:
    return [FixedScheduler, LPScheduler]
