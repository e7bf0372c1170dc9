"""What codecs cost: exact match of the quickstart's job, and perplexity of held-out text, side by side.

    python benchmarks/accuracy.py [--json] [--lines 1300] [--more 3000]

The quickstart asks 600 questions, of which up to five change sides with a rounding: more of the same kind tell a loss
from chance.
int4 comes with our encoder and with plain min/max at the same bits; the last column is our loss of
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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from quickstart.records import heldout_examples

RECIPE = Path(__file__).parents[1] / "recipes/quickstart.yaml"
TEXT = RECIPE.parent / "data/quickstart_heldout.txt"
MORE_SEED = 991
"""Of the further questions, which the quickstart does not ask."""
FIRST_TOKEN = 2
"""With which every text begins, for OPT."""
ONE_TIER = (
    "tiers.device.budget=2GiB",
    "scheduler={plugin: fixed, gpu_batch_size: 100, num_gpu_batches: 1, weights: {device: 100}, "
    "kv_cache: {device: 100}, activations: {device: 100}}",
)
INT4, MINMAX = "group-int4", "{plugin: group-int4, encoder: minmax}"
INT8_ACTIVATIONS = "{plugin: group-int4, int8_activations: true}"
FOUR_BIT_TABLE = "{plugin: group-int4, table_bits: 4}"
ROWS = (
    ("none", "none", "none"),
    ("int8 both", "group-int8", "group-int8"),
    ("int8 both, int8 activations", "{plugin: group-int8, int8_activations: true}", "group-int8"),
    ("int4 weights", INT4, "none"),
    ("int4 weights, min/max", MINMAX, "none"),
    ("int4 weights, int8 activations", INT8_ACTIVATIONS, "none"),
    ("int4 weights, 4-bit table", FOUR_BIT_TABLE, "none"),
    ("int4 KV cache", "none", INT4),
    ("int4 KV cache, min/max", "none", MINMAX),
    ("int4 both", INT4, INT4),
    ("int4 both, min/max", MINMAX, MINMAX),
    ("int4 both, int8 activations", INT8_ACTIVATIONS, INT4),
)
"""What a row is called, and the codecs of weights and KV cache; min/max comes after what it is compared with."""


@dataclass(frozen=True, slots=True)
class Row:
    """What one pair of codecs gives."""

    name: str
    matched: int
    total: int
    more_matched: int
    more: int
    """Of the further questions, how many were answered right, and all of them."""
    perplexity: float
    loss: float
    """Of perplexity, against no codec."""


def main() -> None:
    """Measure every row, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lines", type=int, default=1300, help="how many lines of the text are scored")
    parser.add_argument("--more", type=int, default=3000, help="how many further questions are asked")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    if min(options.lines, options.more) < 1:
        parser.error("at least one line and one further question")
    rows = list(measure(options.lines, options.more))
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        Console(width=120).print(table(rows))


def measure(lines: int, more: int) -> Iterator[Row]:
    """The rows in their order; the first has no codec, and the others' losses are against it."""
    plain = None
    for name, weights, kv_cache in ROWS:
        codecs = f"codecs={{weights: {weights}, kv_cache: {kv_cache}}}"
        match = run(codecs, "tiers.device.budget=96MiB")["exact_match"]
        more_matched, perplexity = further_matches(codecs, more), held_out_perplexity(codecs, lines)
        plain = perplexity if plain is None else plain
        found = f"{match['matched']} of {match['total']}, {more_matched} of {more}"
        print(f"{name}: {found}, perplexity {perplexity:.4f}", file=sys.stderr)
        yield Row(name, match["matched"], match["total"], more_matched, more, perplexity, perplexity - plain)


def further_matches(codecs: str, more: int) -> int:
    """How many of so many further questions are answered right."""
    asked = islice(heldout_examples(MORE_SEED), more)
    jobs = ({"prompt": prompt, "expected": answer} for prompt, answer in asked)
    matched: int = run_jobs(jobs, codecs, "task: generate, max_new_tokens: 24")["exact_match"]["matched"]
    return matched


def held_out_perplexity(codecs: str, lines: int) -> float:
    """Of the first lines of the held-out text."""
    texts = TEXT.read_text(encoding="utf-8").splitlines()[:lines]
    jobs = ({"prompt_token_ids": [FIRST_TOKEN], "completion": text} for text in texts)
    perplexity: float = run_jobs(jobs, codecs, "task: score")["perplexity"]
    return perplexity


def run_jobs(jobs: Iterable[dict[str, Any]], codecs: str, workload: str) -> dict[str, Any]:
    """The metrics of these prompts on one tier; workload: its keys beside `prompts`."""
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.jsonl"
        prompts.write_text("".join(json.dumps(job) + "\n" for job in jobs), encoding="utf-8")
        return run(codecs, *ONE_TIER, f"workload={{prompts: {prompts}, {workload}}}")


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
    found = Table("codecs", "exact match", f"of {rows[0].more} more", "perplexity", "loss", "of min/max's")
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        compared = after is not None and after.name == f"{row.name}, min/max"
        ratio = f"{row.loss / after.loss:.3f}" if after is not None and compared else ""
        match = f"{row.matched} of {row.total} ({_percent(row.matched, row.total)})"
        more = _percent(row.more_matched, row.more)
        found.add_row(row.name, match, more, f"{row.perplexity:.4f}", f"{row.loss:+.4f}", ratio)
    return found


def _percent(matched: int, total: int) -> str:
    return f"{100 * matched / total:.1f} %"


if __name__ == "__main__":
    main()
