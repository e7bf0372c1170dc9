"""How time grows with the model and with the number of prompts: linearly, or something is wrong.

    sudo -E env PATH="$PATH" python benchmarks/growth.py [--work FOLDER] [--new-tokens 8]

All weights on the disk, the KV cache in memory. Prints two tables.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from throughput import engine
from throughput.child import Done, say
from throughput.configuration import GIB, Configuration
from throughput.memory_cap import drop_page_cache
from throughput.published import published_shape
from throughput.table import markdown

LIMIT_S = 3600.0
MODELS = ("opt-1.3b", "opt-2.7b", "opt-6.7b")
PROMPTS = (64, 128, 256)
BASE = Configuration(
    name="growth",
    model=MODELS[0],
    cap_nbytes=6 * GIB,
    prompt_tokens=32,
    new_tokens=8,
    sequences=64,
    gpu_batch_size=32,
    num_gpu_batches=2,
    kv_page_tokens=4,
    weights_percent=0,
    kv_cache_percent=100,
    activations_percent=100,
)


def main() -> None:
    """Print a table by model and one by prompts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--prompts", type=int, nargs="+", default=PROMPTS)
    parser.add_argument("--new-tokens", type=int, default=BASE.new_tokens)
    parser.add_argument("--work", type=Path, help="folder for checkpoints and the disk tier; default: a temporary one")
    options = parser.parse_args()
    base = replace(BASE, new_tokens=options.new_tokens, model=options.models[0])
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        by_model = [replace(base, name=f"{model}-growth", model=model) for model in options.models]
        by_prompts = [replace(base, name=f"{count}-prompts", sequences=count) for count in options.prompts]
        models = [(c.model, parameters(c.model) / 1e9, _run(c, work)) for c in by_model]
        prompts = [(str(c.sequences), float(c.sequences), _run(c, work)) for c in by_prompts]
    print(markdown(("model", "parameters, billions", "ms a token", "ms a token and billion"), _table(models)))
    print()
    print(markdown(("prompts", "times as many", "ms a token", "times as long"), _relative(prompts)))


def parameters(model: str) -> int:
    """Numbers in the large parameters."""
    shape = published_shape(model)
    return 12 * shape.layers * shape.hidden**2 + shape.vocabulary * shape.hidden


def _run(configuration: Configuration, work: Path) -> float:
    """Seconds a generated token. Raises SystemExit when the run does not finish."""
    recipe = engine.prepare(configuration, work)
    drop_page_cache()
    outcome = engine.run(configuration, recipe, limit_s=LIMIT_S)
    say(f"{configuration.name}: {engine.describe(outcome)}")
    if not isinstance(outcome, Done):
        raise SystemExit(f"{configuration.name}: {outcome}")
    return 1 / float(outcome.answer["tokens_per_s"])


def _table(runs: Sequence[tuple[str, float, float]]) -> list[Sequence[str]]:
    return [
        (name, f"{size:.2f}", f"{1e3 * token_s:.1f}", f"{1e3 * token_s / size:.1f}") for name, size, token_s in runs
    ]


def _relative(runs: Sequence[tuple[str, float, float]]) -> list[Sequence[str]]:
    _, first, first_s = runs[0]
    return [
        (name, f"{size / first:.1f}", f"{1e3 * token_s:.1f}", f"{size * token_s / (first * first_s):.2f}")
        for name, size, token_s in runs
    ]


if __name__ == "__main__":
    main()
