"""What a user or a plugin can cause. Every message says what, where, and what would work."""

from typing import Self


class FlexFlowError(Exception):
    """Base of every error that the user can mend; the command line turns it into exit status 2.

    what:  what is wrong, one sentence without a full stop.
    where: the file, recipe key, tensor or line it was found at; empty when `what` says it.
    fix:   what would work; empty when nothing but removing the cause would.
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(self._message())

    def at(self, where: str) -> Self:
        """The same error, found at `where`; children may take other arguments than these."""
        found = type(self).__new__(type(self))
        found.__dict__.update(self.__dict__, where=where)
        found.args = (found._message(),)
        return found

    def within(self, whole: str) -> Self:
        """The same error, found in a part of `whole`: the place that it tells, if it does, stands behind that."""
        return self.at(f"{whole}: {self.where}" if self.where else whole)

    def _message(self) -> str:
        located = f"{self.where}: {self.what}" if self.where else self.what
        return f"{located}; {self.fix}" if self.fix else located


class RecipeError(FlexFlowError):
    """The recipe, or a `--set`, asks for something that does not exist or contradicts itself."""


class PluginError(FlexFlowError):
    """A plugin is unknown, broken, duplicated or written for another API version."""


class CheckpointError(FlexFlowError):
    """A checkpoint is missing, incomplete, of the wrong shape, or unsafe to read."""


class CorruptDataError(FlexFlowError):
    """Stored bytes do not match their checksum, or are not what their metadata declares."""


class StorageError(FlexFlowError):
    """A path can't be written, or the disk is full."""


class PromptError(FlexFlowError):
    """A prompt file or one of its lines can't be used."""


class TierError(FlexFlowError):
    """A tier is not available on this machine, or was asked for more than its budget."""


class PolicyError(FlexFlowError):
    """A policy can't be carried out: something does not fit, or its shares make no sense."""


class HardwareError(FlexFlowError):
    """A hardware profile is missing, can't be read, or lacks a figure that a plan needs."""


class NotFiniteError(FlexFlowError):
    """What a model computed for a sequence of a job is infinite, or no number.

    sequence: its number among those of the run.
    """

    def __init__(self, what: str, *, sequence: int, fix: str) -> None:
        self.sequence = sequence
        super().__init__(what, where=f"sequence {sequence}", fix=fix)


class ProblemsError(FlexFlowError):
    """Several problems of one recipe, told together."""

    def __init__(self, problems: list[FlexFlowError]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in problems))


class TaskError(Exception):
    """A task of a run failed. Its cause is chained; a FlexFlowError cause is what the user sees."""


class StalledError(Exception):
    """No task of a run ran for the watchdog's time, although some were left: a bug of ours."""


def raise_problems(problems: list[FlexFlowError]) -> None:
    """Raise the one problem, or all of them together, or nothing."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise ProblemsError(problems)
