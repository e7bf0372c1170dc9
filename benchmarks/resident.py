"""What offloading costs when nothing needs it: everything in memory, against `generate` of transformers.

    sudo -E env PATH="$PATH" python benchmarks/resident.py [--models opt-125m opt-1.3b] [--work FOLDER]

Batch 32, bfloat16, the same checkpoint, in turn; both sides are timed from the first prompt to the last token, without
loading. Prints a table.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from throughput import engine
from throughput.checkpoint import checkpoint_folder
from throughput.child import Done, Outcome, run_capped, say
from throughput.configuration import GIB, Configuration
from throughput.table import markdown

LIMIT_S = 1800.0
HEADER = ("model", "transformers tokens/s", "ours tokens/s", "ratio", "ratios of all runs")
RESIDENT = Configuration(
    name="resident",
    model="opt-125m",
    cap_nbytes=12 * GIB,
    prompt_tokens=32,
    new_tokens=32,
    sequences=32,
    gpu_batch_size=32,
    num_gpu_batches=1,
    kv_page_tokens=16,
    weights_percent=100,
    kv_cache_percent=100,
    activations_percent=100,
)


def main() -> None:
    """Print one row a model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["opt-125m", "opt-1.3b"])
    parser.add_argument("--work", type=Path, help="folder for checkpoints; default: a temporary one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=RESIDENT.new_tokens)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        chosen = [
            replace(RESIDENT, name=f"{m}-resident", model=m, new_tokens=options.new_tokens) for m in options.models
        ]
        rows = [_row(c, [_pair(c, work) for _ in range(options.repeats)]) for c in chosen]
    print(markdown(HEADER, rows))


def _pair(configuration: Configuration, work: Path) -> tuple[float, float]:
    """Tokens a second of transformers and of this engine, one after the other."""
    c, recipe = configuration, engine.prepare(configuration, work)
    numbers = (c.sequences, c.prompt_tokens, c.new_tokens)
    command = ["-m", "throughput.generate", str(checkpoint_folder(work, c.model)), *map(str, numbers)]
    seconds = _answer(c, run_capped(command, c.cap(), limit_s=LIMIT_S), "seconds")
    theirs = c.sequences * c.new_tokens / seconds
    ours = _answer(c, engine.run(c, recipe, limit_s=LIMIT_S), "tokens_per_s")
    say(f"{c.name}: transformers {theirs:.2f}, ours {ours:.2f} tokens/s")
    return theirs, ours


def _answer(configuration: Configuration, outcome: Outcome, key: str) -> float:
    """Raises SystemExit when the run does not finish."""
    if not isinstance(outcome, Done):
        raise SystemExit(f"{configuration.name}: {outcome}")
    return float(outcome.answer[key])


def _row(configuration: Configuration, pairs: Sequence[tuple[float, float]]) -> Sequence[str]:
    theirs, ours = zip(*pairs, strict=True)
    ratios = [own / other for other, own in pairs]
    figures = (f"{median(theirs):.2f}", f"{median(ours):.2f}", f"{median(ratios):.2f}")
    return (configuration.model, *figures, ", ".join(f"{ratio:.2f}" for ratio in ratios))


if __name__ == "__main__":
    main()
