"""The machine that a verb plans for: from a file, or this one, measured as far as it has not been before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flexflow_engine.errors import HardwareError
from flexflow_engine.hookspecs import NAME

if TYPE_CHECKING:
    from flexflow_engine.engine import HardwareFor

HARDWARE_VARIABLE = f"{NAME.upper()}_HARDWARE"
"""Environment variable that stands for `--hardware`: one file for many runs."""

Hardware = Annotated[
    Path | None,
    typer.Option(
        "--hardware",
        metavar="F.yaml",
        envvar=HARDWARE_VARIABLE,
        help="The machine to plan for; default: this one, measured where it has not been.",
    ),
]


def hardware_for(file: Path | None, notice: Callable[[str], None]) -> HardwareFor:
    """notice: told of what is measured, before it is. Raises ProblemsError when the file can't be read."""
    from flexflow_engine.planning.hardware import read_profile  # noqa: PLC0415  # torch; --help must not import it
    from flexflow_engine.planning.profile.cache import this_machine  # noqa: PLC0415
    from flexflow_engine.planning.profile.extent import Extent  # noqa: PLC0415

    if file is not None:
        profile = read_profile(file)  # now: a run goes on where a machine is unknown, and this is another problem
        return lambda needs: profile
    return lambda needs: this_machine(needs, extent=Extent(), notice=notice)


@contextmanager
def lacking_at(file: Path | None) -> Iterator[None]:
    """What a plan lacks of a machine is told as lacking in the file that describes it."""
    try:
        yield
    except HardwareError as error:
        if file is None:
            raise
        raise error.at(str(file)) from error
