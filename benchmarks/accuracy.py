"""What codecs cost in answers: exact match of a recipe's job for weights and KV cache of none, 8 and 4 bits.

    python benchmarks/accuracy.py [RECIPE]          default: recipes/quickstart.yaml

One run a row, everything else as the recipe says but for the compute tier's budget, which decoding needs some of.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROWS = (
    ("none", "none"),
    ("group-int8", "group-int8"),
    ("group-int4", "none"),
    ("{plugin: group-int4, encoder: minmax}", "none"),
    ("none", "group-int4"),
    ("group-int4", "group-int4"),
)


def main() -> None:
    """Print one line a row of the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path, nargs="?", default=Path("recipes/quickstart.yaml"))
    parser.add_argument("--device-budget", default="96MiB")
    options = parser.parse_args()
    print("| weights | KV cache | exact match |\n| --- | --- | --- |")
    for weights, kv_cache in ROWS:
        matched, total = run(options.recipe, weights, kv_cache, options.device_budget)
        print(f"| {weights} | {kv_cache} | {matched} of {total} ({100 * matched / total:.1f} %) |", flush=True)


def run(recipe: Path, weights: str, kv_cache: str, budget: str) -> tuple[int, int]:
    """Exact matches of one run, and how many prompts had an answer to match."""
    command = [sys.executable, "-m", "flexflow_engine.run", str(recipe.resolve()), "--json"]
    command += ["--set", f"codecs.weights={weights}", "--set", f"codecs.kv_cache={kv_cache}"]
    command += ["--set", f"tiers.device.budget={budget}"]
    with tempfile.TemporaryDirectory() as folder:
        output = subprocess.check_output(command, cwd=folder, stderr=subprocess.DEVNULL, text=True)
    found = json.loads(output)["exact_match"]
    return found["matched"], found["total"]


if __name__ == "__main__":
    main()
