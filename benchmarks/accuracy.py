"""What codecs cost: exact match of the quickstart's job, and perplexity of held-out text, side by side.

    python benchmarks/accuracy.py [--json] [--lines 1300]

Every int4 row comes with our encoder and with plain min/max at the same bits; the last column is our loss of
perplexity as a share of that of min/max. The text is scored line by line, each from its first token on, over the cache
as it is encoded; its lines lie on one tier, in large batches, which changes no score. Exact match is the quickstart as
it is shipped, but for the first tier's budget, which decoding needs some of.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RECIPE = Path(__file__).parents[1] / "recipes/quickstart.yaml"
TEXT = RECIPE.parent / "data/quickstart_heldout.txt"
FIRST_TOKEN = 2
"""With which every text begins, for OPT."""
ONE_TIER = (
    "tiers.device.budget=2GiB",
    "scheduler={plugin: fixed, gpu_batch_size: 100, num_gpu_batches: 1, weights: {device: 100}, "
    "kv_cache: {device: 100}, activations: {device: 100}}",
)
INT4, MINMAX = "group-int4", "{plugin: group-int4, encoder: minmax}"
ROWS = (
    ("none", "none", "none"),
    ("int8 both", "group-int8", "group-int8"),
    ("int4 weights", INT4, "none"),
    ("int4 weights, min/max", MINMAX, "none"),
    ("int4 KV cache", "none", INT4),
    ("int4 KV cache, min/max", "none", MINMAX),
    ("int4 both", INT4, INT4),
    ("int4 both, min/max", MINMAX, MINMAX),
)
"""What a row is called, and the codecs of weights and KV cache; min/max comes after what it is compared with."""


@dataclass(frozen=True, slots=True)
class Row:
    """What one pair of codecs gives."""

    name: str
    matched: int
    total: int
    perplexity: float
    loss: float
    """Of perplexity, against no codec."""


def main() -> None:
    """Measure every row, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lines", type=int, default=1300, help="how many lines of the text are scored")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    rows = list(measure(options.lines))
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        Console(width=100).print(table(rows))


def measure(lines: int) -> Iterator[Row]:
    """The rows in their order; the first has no codec, and the others' losses are against it."""
    plain = None
    for name, weights, kv_cache in ROWS:
        codecs = f"codecs={{weights: {weights}, kv_cache: {kv_cache}}}"
        match = run(codecs, "tiers.device.budget=96MiB")["exact_match"]
        perplexity = held_out_perplexity(codecs, lines)
        plain = perplexity if plain is None else plain
        print(f"{name}: {match['matched']} of {match['total']}, perplexity {perplexity:.4f}", file=sys.stderr)
        yield Row(name, match["matched"], match["total"], perplexity, perplexity - plain)


def held_out_perplexity(codecs: str, lines: int) -> float:
    """Of the first lines of the held-out text."""
    texts = TEXT.read_text(encoding="utf-8").splitlines()[:lines]
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "text.jsonl"
        jobs = ({"prompt_token_ids": [FIRST_TOKEN], "completion": text} for text in texts)
        prompts.write_text("".join(json.dumps(job) + "\n" for job in jobs), encoding="utf-8")
        perplexity: float = run(codecs, *ONE_TIER, f"workload={{task: score, prompts: {prompts}}}")["perplexity"]
        return perplexity


def run(*settings: str) -> dict[str, Any]:
    """The metrics of the quickstart with some settings changed, in a folder of its own: nothing is left of it."""
    command = [sys.executable, "-m", "flexflow_engine.run", str(RECIPE), "--json"]
    command += [argument for setting in settings for argument in ("--set", setting)]
    with tempfile.TemporaryDirectory() as folder:
        output = subprocess.check_output(command, cwd=folder, stderr=subprocess.DEVNULL, text=True)
    metrics: dict[str, Any] = json.loads(output)
    return metrics


def table(rows: Sequence[Row]) -> Table:
    """One line a row."""
    found = Table("codecs", "exact match", "perplexity", "loss", "of min/max's")
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        compared = after is not None and after.name == f"{row.name}, min/max"
        ratio = f"{row.loss / after.loss:.3f}" if after is not None and compared else ""
        match = f"{row.matched} of {row.total} ({100 * row.matched / row.total:.1f} %)"
        found.add_row(row.name, match, f"{row.perplexity:.4f}", f"{row.loss:+.4f}", ratio)
    return found


if __name__ == "__main__":
    main()
