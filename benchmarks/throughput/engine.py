"""This engine's side: recipes run by its own command line, in a process under the cap."""

from __future__ import annotations

from pathlib import Path

import yaml

from throughput.checkpoint import CONFIG, checkpoint_folder
from throughput.child import Done, Outcome, run_capped, run_free, say
from throughput.configuration import Configuration
from throughput.roofline import Rates

RUN = ("-m", "flexflow_engine.run")


def prepare(configuration: Configuration, work: Path) -> Path:
    """Make the checkpoint, if it isn't there, and import it, if it isn't; the recipe's file."""
    folder = checkpoint_folder(work, configuration.model)
    if not (folder / CONFIG).exists():
        say(f"making {configuration.model} in {folder}")
        run_free(["-m", "throughput.checkpoint", configuration.model, str(folder)])
    recipe = work / f"{configuration.name}.yaml"
    recipe.write_text(yaml.safe_dump(configuration.recipe(work), sort_keys=False))
    say(f"{configuration.name}: importing")
    run_free(["-m", "flexflow_engine", "import", str(recipe), "--json"])
    return recipe


def run(configuration: Configuration, recipe: Path, *, limit_s: float, trace: Path | None = None) -> Outcome:
    """The whole job; the answer is the engine's metrics."""
    output = recipe.with_suffix(".completions.jsonl")
    command = [*RUN, str(recipe), "--json", "--output", str(output)]
    command += ["--trace", str(trace)] if trace else []
    return run_capped(command, configuration.cap(), limit_s=limit_s)


def planned_nbytes(recipe: Path) -> int:
    """What the recipe's policy puts on the compute tier."""
    plan = run_free([*RUN, str(recipe), "--dry-run", "--json"])
    return int(plan["memory"]["device"]["peak_bytes"])


def measure_rates(configuration: Configuration, work: Path) -> Rates:
    """Of the machine, now, with as many rows as the configuration's GPU batches have."""
    folder = checkpoint_folder(work, configuration.model)
    rows = str(configuration.gpu_batch_size)
    where = ["-m", "throughput.gpu_rates"] if configuration.gpu else ["-m", "throughput.rates", str(folder)]
    further = ["int8"] if configuration.multiplies_integers else []
    answer = run_free([*where, configuration.model, rows, *further])
    return Rates(**answer)


def describe(outcome: Outcome) -> str:
    """One line for people."""
    if not isinstance(outcome, Done):
        return str(outcome)
    metrics = outcome.answer
    return (
        f"{metrics['tokens_per_s']:.2f} tokens/s, prefill {metrics['prefill_s']:.1f} s, decode "
        f"{metrics['decode_s']:.1f} s, bound by {metrics['bound_by']}, peak {outcome.peak_bytes / 2**20:.0f} MiB"
    )
