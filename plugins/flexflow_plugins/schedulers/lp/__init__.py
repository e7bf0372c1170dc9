"""The scheduler that chooses the policy itself, with a linear program over measured hardware."""

from flexflow_plugins.schedulers.lp.scheduler import LPOptions, LPScheduler

__all__ = ["LPOptions", "LPScheduler"]
