"""How much of a decode step's wall time its busiest lane works: 1.0 is perfect overlap of everything else.

    sudo -E env PATH="$PATH" python benchmarks/overlap.py [--work FOLDER] [--repeats 3]

OPT-1.3B with its weights on the disk. How many rows make compute and disk take equally long follows from rates measured
first: with as many rows it is balanced, with a quarter of them bound by the disk, and bound by compute with three
quarters of the weights resident. The cap leaves no page cache beyond the engine's budget. Times come from the trace.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from throughput import engine
from throughput.child import Done, say
from throughput.configuration import GIB, RESERVE_NBYTES, Configuration
from throughput.memory_cap import drop_page_cache
from throughput.steps import Window, decode_window
from throughput.table import markdown

FIRST_STEP = 2
"""Step 0 computes the prompts; while step 1 ran, loads of the prompts' step may have been under way."""
CALIBRATION_ROWS = 64
LIMIT_S = 1800.0
HEADER = ("configuration", "rows", "decode step", "busiest lane", "its busy time", "wall / busy", "all runs")


def main() -> None:
    """Print one row a configuration."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="opt-1.3b")
    parser.add_argument("--work", type=Path, help="folder for checkpoints and the disk tier; default: a temporary one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        chosen = list(configurations(_calibrated(options.model, options.new_tokens, work)))
        rows = [_row(c, [_run(c, work) for _ in range(options.repeats)]) for c in chosen]
    print(markdown(HEADER, rows))


def configurations(balanced: Configuration) -> Iterator[Configuration]:
    """The three, from the balanced one."""
    yield replace(balanced, name="disk-bound", gpu_batch_size=max(1, balanced.gpu_batch_size // 4))
    yield balanced
    yield replace(balanced, name="compute-bound", weights_percent=75)


def _calibrated(model: str, new_tokens: int, work: Path) -> Configuration:
    """A weight is 2 bytes to read and 2 flop a row to compute with: rows = matmul rate / disk rate."""
    balanced = Configuration(
        name="balanced",
        model=model,
        cap_nbytes=64 * GIB,
        prompt_tokens=16,
        new_tokens=new_tokens,
        sequences=2 * CALIBRATION_ROWS,
        gpu_batch_size=CALIBRATION_ROWS,
        num_gpu_batches=2,
        kv_page_tokens=16,
        weights_percent=0,
        kv_cache_percent=100,
        activations_percent=100,
    )
    engine.prepare(balanced, work)
    rates = engine.measure_rates(balanced, work)
    rows = max(1, round(rates.decode_matmul / rates.far_read / balanced.num_gpu_batches))
    say(f"{rates.decode_matmul / 1e9:.0f} Gflop/s, disk {rates.far_read / 1e9:.2f} GB/s: {rows} x 2 rows")
    return replace(balanced, gpu_batch_size=rows)


def _run(configuration: Configuration, work: Path) -> Window:
    """Raises SystemExit when the run does not finish."""
    rows = configuration.gpu_batch_size * configuration.num_gpu_batches
    c = replace(configuration, sequences=rows)
    c = replace(c, cap_nbytes=engine.planned_nbytes(engine.prepare(c, work)) + RESERVE_NBYTES)
    recipe, trace = engine.prepare(c, work), work / f"{c.name}.trace.json"
    drop_page_cache()
    outcome = engine.run(c, recipe, limit_s=LIMIT_S, trace=trace)
    say(f"{c.name}: {engine.describe(outcome)}")
    if not isinstance(outcome, Done):
        raise SystemExit(f"{c.name}: {outcome}")
    return decode_window(json.loads(trace.read_text())["traceEvents"], FIRST_STEP)


def _row(configuration: Configuration, windows: Sequence[Window]) -> Sequence[str]:
    window = sorted(windows, key=lambda w: w.ratio)[len(windows) // 2]
    steps = configuration.new_tokens - FIRST_STEP
    return (
        configuration.name,
        f"{configuration.gpu_batch_size} x {configuration.num_gpu_batches}",
        f"{window.seconds / steps:.2f} s",
        window.busiest,
        f"{window.busy_s[window.busiest] / steps:.2f} s",
        f"{median(w.ratio for w in windows):.2f}",
        ", ".join(f"{w.ratio:.2f}" for w in windows),
    )


if __name__ == "__main__":
    main()
