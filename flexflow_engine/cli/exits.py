"""How a verb ends: 0 done, 2 something that the user can mend, 130 Ctrl-C; anything else is our bug and a traceback."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import ParamSpec

from flexflow_engine.errors import FlexFlowError, ProblemsError, TaskError

Parameters = ParamSpec("Parameters")

USER_ERROR = 2
INTERRUPTED = 130


def with_exit_status(verb: Callable[Parameters, None]) -> Callable[Parameters, None]:
    """The verb, its errors told on stderr and turned into an exit status."""

    @functools.wraps(verb)
    def wrapped(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
        try:
            verb(*args, **kwargs)
        except KeyboardInterrupt as error:
            print("; ".join(["interrupted", *_notes(error)]), file=sys.stderr)
            sys.exit(INTERRUPTED)
        except FlexFlowError as error:
            _leave(error, _notes(error))
        except TaskError as error:
            _leave(next(_causes(error), None) or error, _notes(error))

    return wrapped


def _leave(error: FlexFlowError | TaskError, notes: Sequence[str]) -> None:
    if isinstance(error, TaskError):
        raise error
    for problem in error.problems if isinstance(error, ProblemsError) else (error,):
        print(f"error: {problem}", file=sys.stderr)
    for note in notes:
        print(note, file=sys.stderr)
    sys.exit(USER_ERROR)


def _notes(error: BaseException) -> Sequence[str]:
    """What whoever the error passed has added to it."""
    return getattr(error, "__notes__", ())


def _causes(error: BaseException) -> Iterator[FlexFlowError]:
    """The errors behind a failed task that the user can mend, the nearest first."""
    cause = error.__cause__
    while cause is not None:
        if isinstance(cause, FlexFlowError):
            yield cause
        cause = cause.__cause__
