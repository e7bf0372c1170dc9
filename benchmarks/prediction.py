"""Predicted against measured tokens a second: many small jobs of different shapes, placements and codecs.

    python benchmarks/prediction.py [--work FOLDER] [--output F.json] [--only NAME] [--repeats 3] [--keep-profile]

Each job is run `--repeats` times, each time in a process of its own, as a user starts it: what it predicts comes from a
profile of this machine, which it measures right before. Tiers behind a throttled link stand in for slow ones. A shared
machine grows slower or faster from minute to minute, so that one pair of prediction and run tells little: the error is
the median of the pairs'. Every pair is written to a file as it comes; those that are in it are not run again. Nothing
else should run meanwhile: *other load* tells how many processors worked for others.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
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
HEADER = ("job", "predicted", "measured", "error", "of single runs", "busiest lane", "other load")


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
    dtype: str = "float32"
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
            "model": {"plugin": "opt", "checkpoint": checkpoint, "dtype": self.dtype},
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
    Job(name="125m resident", model="opt-125m", rows=(8, 2), tokens=(64, 24)),
    Job(name="125m resident, many rows", model="opt-125m", rows=(32, 2), tokens=(32, 16)),
    Job(name="350m resident, long prompts", model="opt-350m", rows=(4, 1), tokens=(256, 16)),
    Job(name="1.3b slice resident", model="slice", rows=(16, 1), tokens=(64, 12)),
    Job(name="125m resident, bfloat16", model="opt-125m", rows=(32, 1), tokens=(64, 48), dtype="bfloat16"),
    Job(name="1.3b slice resident, bfloat16", model="slice", rows=(32, 1), tokens=(64, 32), dtype="bfloat16"),
    Job(name="125m, weights on disk", model="opt-125m", rows=(16, 4), tokens=(32, 12), weights={"disk": 100}),
    Job(name="1.3b slice, weights on disk", model="slice", rows=(16, 2), tokens=(32, 8), weights={"disk": 100}),
    Job(
        name="1.3b slice, int4 on disk", model="slice", rows=(16, 2), tokens=(32, 8), weights={"disk": 100}, codecs=INT4
    ),
    Job(name="125m, KV on disk", model="opt-125m", rows=(16, 2), tokens=(128, 12), kv_cache={"disk": 100}),
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Tokens a second of one run of a job."""

    job: str
    predicted: float
    measured: float
    bound_by: str
    other_load: float
    """Processors that worked for others, on average, from the start of the job's process to its end."""

    @property
    def error(self) -> float:
        """Of the prediction, relative to what was measured; above 0 where it was too hopeful."""
        return self.predicted / self.measured - 1


def main() -> None:
    """Print one row a job, and the median and worst error."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", choices=[job.name for job in JOBS], help="run these, known or not")
    parser.add_argument("--work", type=Path, help="folder for weights and the disk tier; default: a temporary one")
    parser.add_argument("--output", type=Path, default=Path("prediction.json"), help="results, and those of before")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each job")
    parser.add_argument("--keep-profile", action="store_true", help="measure the machine once, not for each run")
    options = parser.parse_args()
    results = read_results(options.output)
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        prepare(work)
        for job in chosen(options.only or [], results, options.repeats):
            if not options.keep_profile:
                forget_profiles(work)
            results.append(run(job, work))
            write_results(options.output, results)
    print(table(results))


def chosen(only: Sequence[str], known: Sequence[Result], repeats: int) -> list[Job]:
    """One round of jobs after the other: those that are asked for, else what is missing of `repeats` runs of each."""
    if only:
        return [job for _ in range(repeats) for job in JOBS if job.name in only]
    done = Counter(result.job for result in known)
    return [job for turn in range(repeats) for job in JOBS if done[job.name] <= turn]


def prepare(work: Path) -> None:
    """The plugin of the throttled tier, and the checkpoint of the slice."""
    install_throttled_tier(work)
    if not (work / "slice").exists():
        torch.manual_seed(0)
        OPTForCausalLM(OPTConfig(**SLICE)).save_pretrained(work / "slice")  # type: ignore[arg-type]  # a dict of sizes


def install_throttled_tier(work: Path) -> Path:
    """The folder with the plugin, for the import path."""
    metadata = work / "site" / "throttled_link-1.0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (work / "site" / "throttled_link.py").write_text(PLUGIN)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: throttled-link\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[flexflow_engine]\nmain = throttled_link\n")
    return work / "site"


def forget_profiles(work: Path) -> None:
    """What jobs have measured of the machine; compiled kernels beside it may stay."""
    for profiles in (work / "cache").glob("*/hardware"):
        shutil.rmtree(profiles)


def run(job: Job, work: Path) -> Result:
    """Import what the job needs, then run it once. Raises SystemExit when that fails."""
    recipe = work / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(job.recipe(work), sort_keys=False))
    engine(work, "import", str(recipe))
    before = Load.now()
    metrics = json.loads(engine(work, "run", str(recipe), "--json", "--output", str(work / "out.jsonl")))
    result = Result(
        job=job.name,
        predicted=metrics["predicted_tokens_per_s"],
        measured=metrics["tokens_per_s"],
        bound_by=metrics["bound_by"],
        other_load=Load.now().others_since(before),
    )
    figures = f"predicted {result.predicted:.1f}, measured {result.measured:.1f} tokens/s"
    say(f"{job.name}: {figures}")
    return result


def engine(work: Path, *arguments: str) -> str:
    """What the command prints."""
    paths = [str(work / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "flexflow_engine", *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "XDG_CACHE_HOME": str(work / "cache")},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: exit status {done.returncode}")
    return done.stdout


@dataclass(frozen=True, slots=True)
class Load:
    """Processor seconds since they were first counted, and the clock."""

    at_s: float
    machine_s: float
    """Of all processes, kernel included; 0 where the system does not tell."""
    children_s: float
    """Of those that this one started and that have ended."""

    @classmethod
    def now(cls) -> Load:
        stat, ticks = Path("/proc/stat"), os.sysconf("SC_CLK_TCK")
        counts = [int(x) for x in stat.read_text().splitlines()[0].split()[1:9]] if stat.exists() else [0] * 8
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        idle, waiting = counts[3], counts[4]
        return cls(time.monotonic(), (sum(counts) - idle - waiting) / ticks, used.ru_utime + used.ru_stime)

    def others_since(self, before: Load) -> float:
        """Processors that others kept busy; stolen time is theirs as well."""
        taken = (self.machine_s - before.machine_s) - (self.children_s - before.children_s)
        return max(0.0, taken) / (self.at_s - before.at_s)


def table(results: Sequence[Result]) -> str:
    """One line a job, in the order of `JOBS`."""
    by_job = {job.name: [result for result in results if result.job == job.name] for job in JOBS}
    ran = {name: runs for name, runs in by_job.items() if runs}
    rows = [
        (
            name,
            f"{median(run.predicted for run in runs):.1f}",
            f"{median(run.measured for run in runs):.1f}",
            f"{100 * error(runs):+.0f} %",
            ", ".join(f"{100 * run.error:+.0f}" for run in runs),
            runs[0].bound_by,
            f"{median(run.other_load for run in runs):.2f}",
        )
        for name, runs in ran.items()
    ]
    errors = [100 * abs(error(runs)) for runs in ran.values()]
    judged = f"median error {median(errors):.1f} %, worst {max(errors):.1f} %, {len(errors)} jobs"
    return f"{markdown(HEADER, rows)}\n\n{judged}"


def error(runs: Sequence[Result]) -> float:
    """Of a job's predictions: the median of its runs', as a fraction."""
    return median(run.error for run in runs)


def read_results(path: Path) -> list[Result]:
    """Empty where there is no file."""
    return [Result(**x) for x in json.loads(path.read_text())] if path.exists() else []


def write_results(path: Path, results: Sequence[Result]) -> None:
    path.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")


if __name__ == "__main__":
    main()
