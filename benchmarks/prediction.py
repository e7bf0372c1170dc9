"""Predicted against measured tokens a second: many small jobs of different shapes, placements and codecs.

    python benchmarks/prediction.py [--work FOLDER] [--output F.json] [--only NAME] [--keep-profile]

Each job is a run of its own, as a user starts it: what it predicts comes from a profile of this machine, which it
measures right before. Tiers behind a throttled link stand in for slow ones. Every result is written to a file as it
comes; jobs that are in it are not run again. Nothing else should run meanwhile: *other load* tells how many processors
worked for others. A machine that grows slower or faster meanwhile, as a shared one does, spoils a comparison: a fixed
piece of work is timed before and after, and where the two differ by more than a tenth the job is tried again, up to
three times, and the try with the least drift counts.
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
TRIES, STEADY = 3, 0.1
HEADER = ("job", "predicted", "measured", "error", "busiest lane", "drift", "other load")


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
    Job(name="125m resident", model="opt-125m", rows=(8, 2), tokens=(64, 24)),
    Job(name="125m resident, many rows", model="opt-125m", rows=(32, 2), tokens=(32, 16)),
    Job(name="350m resident, long prompts", model="opt-350m", rows=(4, 1), tokens=(256, 16)),
    Job(name="1.3b slice resident", model="slice", rows=(16, 1), tokens=(64, 12)),
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
    """Tokens a second of one job."""

    job: str
    predicted: float
    measured: float
    bound_by: str
    other_load: float
    """Processors that worked for others, on average, from the start of the job's process to its end."""
    drift: float
    """By how much a fixed piece of work took longer after the job than before it, as a fraction."""

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
    parser.add_argument("--keep-profile", action="store_true", help="measure the machine once, not for each job")
    options = parser.parse_args()
    results = read_results(options.output)
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        prepare(work)
        for job in chosen(options.only or [], results):
            results[job.name] = steadiest(job, work, keep_profile=options.keep_profile)
            write_results(options.output, results)
    print(table([results[job.name] for job in JOBS if job.name in results]))


def chosen(only: Sequence[str], known: Mapping[str, Result]) -> list[Job]:
    """Those that are asked for, else those that have no result yet."""
    return [job for job in JOBS if (job.name in only if only else job.name not in known)]


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


def steadiest(job: Job, work: Path, *, keep_profile: bool) -> Result:
    """The first try during which the machine kept its speed, or of all of them the one that came nearest to that."""
    tries: list[Result] = []
    while len(tries) < TRIES and not any(abs(result.drift) <= STEADY for result in tries):
        if not keep_profile:
            for profiles in (work / "cache").glob("*/hardware"):  # beside compiled kernels, which may stay
                shutil.rmtree(profiles)
        tries.append(run(job, work))
    return min(tries, key=lambda result: abs(result.drift))


def run(job: Job, work: Path) -> Result:
    """Import what the job needs, then run it. Raises SystemExit when that fails."""
    recipe = work / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(job.recipe(work), sort_keys=False))
    engine(work, "import", str(recipe))
    before, speed_s = Load.now(), fixed_work_s()
    metrics = json.loads(engine(work, "run", str(recipe), "--json", "--output", str(work / "out.jsonl")))
    result = Result(
        job=job.name,
        predicted=metrics["predicted_tokens_per_s"],
        measured=metrics["tokens_per_s"],
        bound_by=metrics["bound_by"],
        other_load=Load.now().others_since(before),
        drift=fixed_work_s() / speed_s - 1,
    )
    figures = f"predicted {result.predicted:.1f}, measured {result.measured:.1f} tokens/s"
    say(f"{job.name}: {figures}, drift {100 * result.drift:+.0f} %")
    return result


def fixed_work_s() -> float:
    """Seconds of some products of many tokens and of few: median of several times."""
    matrices = torch.rand(16, 1024, 1024)
    times = []
    for _ in range(9):
        begin = time.perf_counter()
        for tokens in (8, 256):
            x = torch.rand(tokens, 1024)
            for matrix in matrices:
                torch.nn.functional.linear(x, matrix)
        times.append(time.perf_counter() - begin)
    return median(times)


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
    rows = [
        (
            r.job,
            f"{r.predicted:.1f}",
            f"{r.measured:.1f}",
            f"{100 * r.error:+.0f} %",
            r.bound_by,
            f"{100 * r.drift:+.0f} %",
            f"{r.other_load:.2f}",
        )
        for r in results
    ]
    middle, worst = 100 * median_error(results), 100 * worst_error(results)
    return f"{markdown(HEADER, rows)}\n\nmedian error {middle:.1f} %, worst {worst:.1f} %, {len(results)} runs"


def median_error(results: Sequence[Result]) -> float:
    """Fraction."""
    return median(abs(result.error) for result in results)


def worst_error(results: Sequence[Result]) -> float:
    """Fraction."""
    return max(abs(result.error) for result in results)


def read_results(path: Path) -> dict[str, Result]:
    """By job; none where there is no file."""
    return {x["job"]: Result(**x) for x in json.loads(path.read_text())} if path.exists() else {}


def write_results(path: Path, results: Mapping[str, Result]) -> None:
    path.write_text(json.dumps([asdict(result) for result in results.values()], indent=2) + "\n")


if __name__ == "__main__":
    main()
