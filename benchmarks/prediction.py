"""Predicted against measured tokens a second: many small jobs of different shapes, placements and codecs.

    python benchmarks/prediction.py [--only NAME] [--work FOLDER] [--json]

Each job is a run of its own, as a user starts it: what it predicts comes from this machine's profile, which is measured
first where it has not been. Tiers behind a throttled link stand in for slow ones. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from transformers import OPTConfig, OPTForCausalLM

from throughput.child import say
from throughput.table import markdown

PLUGIN = """from flexflow_engine import hookimpl
from flexflow_engine.testing.tiers import ThrottledTier


@hookimpl
def flexflow_register_tiers():
    return [ThrottledTier]
"""
SLICE = {
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "ffn_dim": 8192,
    "word_embed_proj_dim": 2048,
    "num_hidden_layers": 4,
    "max_position_embeddings": 2048,
    "vocab_size": 50272,
}
"""OPT-1.3B with its first 4 of 24 layers."""
HEADER = ("job", "predicted", "measured", "error", "busiest lane")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run. Shares are percentages; what is left of 100 lies where the model computes."""

    name: str
    model: str
    rows: tuple[int, int]
    """gpu_batch_size and num_gpu_batches; there are as many prompts."""
    tokens: tuple[int, int]
    """Of each prompt, and generated."""
    weights: Mapping[str, int] = field(default_factory=dict)
    kv_cache: Mapping[str, int] = field(default_factory=dict)
    activations: Mapping[str, int] = field(default_factory=dict)
    codecs: Mapping[str, str] = field(default_factory=dict)
    link: tuple[float, float] = (1e9, 0.0)
    """Bytes a second and seconds of latency of the throttled tier, where something lies there."""

    def recipe(self, work: Path) -> dict[str, Any]:
        far = {name for shares in (self.weights, self.kv_cache, self.activations) for name in shares}
        tiers: dict[str, Any] = {"device": {"plugin": "cpu", "budget": "8GiB"}}
        if "far" in far:
            rate, latency = self.link
            link = {"bytes_per_second": rate, "latency_s": latency}
            tiers["far"] = {"plugin": "throttled", "budget": "8GiB", **link}
        tiers["disk"] = {"plugin": "zarr", "budget": "16GiB", "path": str(work / "disk")}
        checkpoint = str(work / "slice") if self.model == "slice" else f"synthetic:{self.model}"
        prompt_tokens, new_tokens = self.tokens
        return {
            "name": re.sub(r"\W+", "_", self.name),
            "model": {"plugin": "opt", "checkpoint": checkpoint, "dtype": "float32"},
            "tiers": tiers,
            "codecs": dict(self.codecs),
            "scheduler": {
                "plugin": "fixed",
                "gpu_batch_size": self.rows[0],
                "num_gpu_batches": self.rows[1],
                "kv_page_tokens": 16,
                **{name: self._shares(name) for name in ("weights", "kv_cache", "activations")},
            },
            "workload": {
                "prompts": {"synthetic": {"count": self.rows[0] * self.rows[1], "prompt_tokens": prompt_tokens}},
                "max_new_tokens": new_tokens,
            },
        }

    def _shares(self, tensor_class: str) -> dict[str, int]:
        far: Mapping[str, int] = getattr(self, tensor_class)
        return {"device": 100 - sum(far.values()), **far}


INT4 = {"weights": "group-int4"}
JOBS = (
    Job(name="125m resident", model="opt-125m", rows=(8, 2), tokens=(64, 32)),
    Job(name="125m resident, many rows", model="opt-125m", rows=(32, 2), tokens=(32, 16)),
    Job(name="350m resident, long prompts", model="opt-350m", rows=(4, 1), tokens=(256, 16)),
    Job(name="1.3b slice resident", model="slice", rows=(16, 1), tokens=(64, 24)),
    Job(name="125m, weights on disk", model="opt-125m", rows=(16, 4), tokens=(32, 12), weights={"disk": 100}),
    Job(name="1.3b slice, weights on disk", model="slice", rows=(16, 2), tokens=(32, 8), weights={"disk": 100}),
    Job(
        name="1.3b slice, int4 on disk", model="slice", rows=(16, 2), tokens=(32, 8), weights={"disk": 100}, codecs=INT4
    ),
    Job(name="125m, KV on disk", model="opt-125m", rows=(16, 2), tokens=(256, 12), kv_cache={"disk": 100}),
    Job(
        name="350m, int8 KV on disk",
        model="opt-350m",
        rows=(8, 2),
        tokens=(128, 12),
        kv_cache={"disk": 100},
        codecs={"kv_cache": "group-int8"},
    ),
    Job(name="125m behind 1 GB/s", model="opt-125m", rows=(8, 2), tokens=(32, 16), weights={"far": 100}),
    Job(
        name="125m behind 0.2 GB/s",
        model="opt-125m",
        rows=(8, 2),
        tokens=(32, 6),
        weights={"far": 100},
        link=(0.2e9, 0.0),
    ),
    Job(
        name="125m behind 1 GB/s and 2 ms",
        model="opt-125m",
        rows=(8, 2),
        tokens=(32, 12),
        weights={"far": 100},
        link=(1e9, 2e-3),
    ),
    Job(
        name="350m, int4 KV behind 0.1 GB/s",
        model="opt-350m",
        rows=(8, 2),
        tokens=(128, 12),
        kv_cache={"far": 100},
        codecs={"kv_cache": "group-int4"},
        link=(0.1e9, 0.0),
    ),
    Job(
        name="1.3b slice, int4 behind 0.3 GB/s",
        model="slice",
        rows=(16, 1),
        tokens=(32, 10),
        weights={"far": 100},
        codecs=INT4,
        link=(0.3e9, 0.0),
    ),
    Job(
        name="125m over three tiers",
        model="opt-125m",
        rows=(8, 4),
        tokens=(64, 12),
        weights={"far": 30, "disk": 40},
        kv_cache={"far": 50, "disk": 20},
        activations={"far": 50},
        link=(0.5e9, 0.5e-3),
    ),
)


@dataclass(frozen=True)
class Result:
    """Tokens a second."""

    job: Job
    predicted: float
    measured: float
    bound_by: str

    @property
    def error(self) -> float:
        """Of the prediction, relative to what was measured; above 0 where it was too hopeful."""
        return self.predicted / self.measured - 1


def main() -> None:
    """Print one row a job, and the median and worst error."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", choices=[job.name for job in JOBS], help="may be repeated")
    parser.add_argument("--work", type=Path, help="folder for weights and the disk tier; default: a temporary one")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        prepare(work)
        results = [run(job, work) for job in JOBS if not options.only or job.name in options.only]
    print(json.dumps(summary(results), indent=2) if options.json else table(results))


def prepare(work: Path) -> None:
    """The plugin of the throttled tier, and the checkpoint of the slice."""
    metadata = work / "site" / "throttled_link-1.0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (work / "site" / "throttled_link.py").write_text(PLUGIN)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: throttled-link\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[flexflow_engine]\nmain = throttled_link\n")
    if not (work / "slice").exists():
        torch.manual_seed(0)
        OPTForCausalLM(OPTConfig(**SLICE)).save_pretrained(work / "slice")  # type: ignore[arg-type]  # a dict of sizes


def run(job: Job, work: Path) -> Result:
    """Raises SystemExit when the run fails."""
    recipe = work / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(job.recipe(work), sort_keys=False))
    done = subprocess.run(
        [sys.executable, "-m", "flexflow_engine.run", str(recipe), "--json", "--output", str(work / "out.jsonl")],
        env=os.environ | {"PYTHONPATH": str(work / "site")},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{job.name}: exit status {done.returncode}")
    metrics = json.loads(done.stdout)
    result = Result(job, metrics["predicted_tokens_per_s"], metrics["tokens_per_s"], metrics["bound_by"])
    say(f"{job.name}: predicted {result.predicted:.1f}, measured {result.measured:.1f} tokens/s")
    return result


def table(results: Sequence[Result]) -> str:
    rows = [
        (r.job.name, f"{r.predicted:.1f}", f"{r.measured:.1f}", f"{100 * r.error:+.0f} %", r.bound_by) for r in results
    ]
    found = summary(results)
    worst, middle = 100 * found["worst_error"], 100 * found["median_error"]
    return f"{markdown(HEADER, rows)}\n\nmedian error {middle:.1f} %, worst {worst:.1f} %, {len(results)} runs"


def summary(results: Sequence[Result]) -> dict[str, Any]:
    errors = [abs(result.error) for result in results]
    return {
        "runs": [
            {"job": r.job.name, "predicted_tokens_per_s": r.predicted, "tokens_per_s": r.measured, "error": r.error}
            for r in results
        ],
        "median_error": median(errors),
        "worst_error": max(errors),
    }


if __name__ == "__main__":
    main()
