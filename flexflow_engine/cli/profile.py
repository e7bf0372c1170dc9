"""`profile`: measure this machine, as far as that has not been done."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flexflow_engine.abc.dtypes import DType
from flexflow_engine.abc.hardware import Curve, HardwareProfile, Link, Processor
from flexflow_engine.cli.columns import columns
from flexflow_engine.cli.outputs import check_distinct, check_writable, write_whole
from flexflow_engine.cli.progress import progress_on_stderr
from flexflow_engine.cli.session import Json, Overrides, inputs_of, load_if_given
from flexflow_engine.user_cache import user_cache

if TYPE_CHECKING:
    from flexflow_engine.planning.profile.needs import Needs


def profile(
    recipe: Annotated[
        Path | None,
        typer.Argument(metavar="RECIPE", help="Measure what this recipe needs; else whatever is installed."),
    ] = None,
    *,
    overrides: Overrides = None,
    dtype: Annotated[DType, typer.Option(help="Of the numbers to compute with, without a recipe.")] = "float32",
    again: Annotated[bool, typer.Option("--again", help="Measure anew what was measured before.")] = False,
    output: Annotated[
        Path | None, typer.Option(metavar="F.yaml", help="Write the profile, for `--hardware` and to be edited.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure what this machine's processors, links and codecs do, or tell what they did."""
    from flexflow_engine.planning.hardware import profile_as_document, render_profile  # noqa: PLC0415  # torch
    from flexflow_engine.planning.profile.cache import measured_again, this_machine  # noqa: PLC0415
    from flexflow_engine.planning.profile.extent import Extent  # noqa: PLC0415

    needs = _needs(recipe, overrides, dtype, output)
    if output is not None:
        check_writable(output)
    measure = measured_again if again else this_machine
    with progress_on_stderr() as progress:
        measured = measure(needs, extent=Extent(), notice=progress.notice)
    if output is not None:
        write_whole(output, render_profile(measured))
    print(json.dumps(profile_as_document(measured), indent=2) if as_json else "\n\n".join(_render(measured)))


def _needs(recipe: Path | None, overrides: list[str] | None, dtype: DType, output: Path | None) -> Needs:
    """Raises StorageError where the output is a file that the recipe's job reads."""
    from flexflow_engine.engine import recipe_needs  # noqa: PLC0415  # torch; --help must not import it
    from flexflow_engine.planning.profile.installed import installed_needs  # noqa: PLC0415

    asked, registry = load_if_given(recipe, overrides)
    if asked is None:
        return installed_needs(registry, dtype, user_cache())
    check_distinct({"--output": output}, {"RECIPE": recipe, **inputs_of(asked)})
    return recipe_needs(asked, registry)


def _render(profile: HardwareProfile) -> Iterator[str]:
    yield profile.name
    for memory, processor in profile.processors.items():
        yield columns((f"on {memory}", "", ""), list(_processor(processor)))
    rows = [(tier, way, *_link(link)) for tier, links in profile.links.items() for way, link in links.items()]
    if rows:
        yield columns(("link", "", "GB/s", "latency", "left beside reverse, links, processors", "leaves"), rows)


def _processor(processor: Processor) -> Iterator[tuple[str, str, str]]:
    for dtype, curve in processor.matmul_flops_per_s.items():
        yield f"matmul, {dtype}", _curve(curve), "GFLOP/s by rows"
    yield "prompts attend", _curve(processor.prefill_attention_flops_per_s), "GFLOP/s by tokens"
    for codec, curve in processor.decode_attention_bytes_per_s.items():
        yield f"a token attends, {codec}", _curve(curve), "GB/s by cached tokens"
    for name, rates in processor.codecs.items():
        encode, decode = rates.encode_values_per_s / 1e9, rates.decode_values_per_s / 1e9
        yield name, f"{encode:.2f} encoded, {decode:.2f} decoded", "10^9 numbers/s"
    yield "norms, additions", f"{processor.memory_bytes_per_s / 1e9:.1f}", "GB/s"
    for name, seconds in (
        ("a task", processor.task_s),
        ("a layer", processor.layer_s),
        ("a product", processor.product_s),
    ):
        yield name, f"{seconds * 1e6:.0f}", "microseconds beside its arithmetic"
    for dtype, tokens in processor.float32_from.items():
        yield f"{dtype} as float32", "never" if tokens is None else f"{tokens}", "tokens from which on it is faster"
    for dtype, team in processor.torch_team.items():
        shared = _curve(team.matmul_flops_per_s) if team else "not faster"
        yield f"{dtype}, torch's threads", shared, "GFLOP/s by rows, if nothing is moved"


def _curve(curve: Curve) -> str:
    return "  ".join(f"{size:.0f}: {rate / 1e9:.3g}" for size, rate in curve.points)


def _link(link: Link) -> tuple[str, str, str, str]:
    left = f"{link.beside.reverse:.2f}, {link.beside.links:.2f}, {link.beside.processors:.2f}"
    rate, latency = f"{link.bytes_per_s / 1e9:.2f}", f"{link.latency_s * 1e6:.0f} us"
    return rate, latency, left, f"{link.leaves_processors:.2f} of the processor"
