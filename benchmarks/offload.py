"""This engine against transformers with accelerate's disk offload, under one memory cap, on the same weights.

    pip install -c constraints.txt -e '.[bench]'
    sudo -E env PATH="$PATH" python benchmarks/offload.py [--configurations NAME …] [--work FOLDER]

Prints a table and writes offload.json and offload.png. A checkpoint of random weights is made once in --work. Each side
runs in a process of its own under the cap, which counts the page cache; before each run the page cache is emptied. With
a GPU (--configurations opt-13b-16GB-gpu) the cap is of the GPU's memory, what accelerate offloads is in the host's, and
the page cache is left alone.
Our job runs in full. The baseline's steps are all alike: of each batch size its prefill, its first steps and its last
ones are timed and extrapolated to the whole job, and its best batch size is what counts. Rates of links, matmuls and
memory are measured before and after each of our runs; what they bound is the roofline. Figures are medians.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from throughput import engine
from throughput.checkpoint import checkpoint_folder
from throughput.child import Done, run_capped, say
from throughput.configuration import GIB, MIB, Configuration
from throughput.extrapolation import SampledJob
from throughput.memory_cap import drop_page_cache
from throughput.results import BaselineTry, EngineRun, Result, read_results, roofline_tokens_per_s, write_results
from throughput.table import HEADER, markdown, plot, throughput_rows

INT4 = {"weights": "group-int4", "kv_cache": "group-int4"}
INTEGERS = {**INT4, "weights": {"plugin": "group-int4", "int8_activations": True}}
EIGHT_BITS = {"weights": {"plugin": "group-int8", "int8_activations": True}, "kv_cache": "group-int8"}
OPT_1_3B = Configuration(
    name="opt-1.3b-1.5GiB",
    model="opt-1.3b",
    cap_nbytes=1536 * MIB,
    prompt_tokens=32,
    new_tokens=128,
    sequences=256,
    gpu_batch_size=128,
    num_gpu_batches=2,
    kv_page_tokens=4,
    weights_percent=4,
    kv_cache_percent=0,
    activations_percent=100,
)
OPT_6_7B = replace(
    OPT_1_3B, name="opt-6.7b-4GiB", model="opt-6.7b", cap_nbytes=4 * GIB, new_tokens=32, weights_percent=13
)
SMOKE = replace(
    OPT_1_3B, name="opt-125m-1GiB", model="opt-125m", cap_nbytes=GIB, new_tokens=16, sequences=32, gpu_batch_size=16,
    num_gpu_batches=2,
)  # fmt: skip
OPT_13B_GPU = replace(
    OPT_1_3B, name="opt-13b-16GB-gpu", model="opt-13b", cap_nbytes=16 * 10**9, new_tokens=32, sequences=512,
    gpu_batch_size=128, num_gpu_batches=4, kv_page_tokens=4, weights_percent=46, gpu=True,
)  # fmt: skip
OPT_1_3B_INT4 = replace(
    OPT_1_3B, name="opt-1.3b-1.5GiB-int4", codecs=INT4, gpu_batch_size=256, num_gpu_batches=1, weights_percent=31
)
CONFIGURATIONS = (
    OPT_1_3B,
    OPT_1_3B_INT4,
    replace(OPT_1_3B_INT4, name="opt-1.3b-1.5GiB-int4-int8", codecs=INTEGERS),
    OPT_6_7B,
    replace(
        OPT_6_7B,
        name="opt-6.7b-2GiB",
        cap_nbytes=2 * GIB,
        sequences=128,
        gpu_batch_size=64,
        num_gpu_batches=2,
        kv_page_tokens=2,
        weights_percent=1,
    ),
)

OPT_13B_GPU_INT4 = replace(
    OPT_13B_GPU, name="opt-13b-16GB-gpu-int4", codecs=INT4, gpu_batch_size=512, num_gpu_batches=1, kv_page_tokens=1,
    weights_percent=100, kv_cache_percent=57,
)  # fmt: skip
OPT_1_3B_INT8 = replace(OPT_1_3B, name="opt-1.3b-1.5GiB-int8", codecs=EIGHT_BITS, weights_percent=22)
OPT_6_7B_INT4 = replace(
    OPT_6_7B, name="opt-6.7b-4GiB-int4-int8", codecs=INTEGERS, gpu_batch_size=256, num_gpu_batches=1,
    weights_percent=56,
)  # fmt: skip
FURTHER = (SMOKE, OPT_1_3B_INT8, OPT_6_7B_INT4, OPT_13B_GPU, OPT_13B_GPU_INT4)
"""Measured when asked for."""


def main() -> None:
    """Measure what was asked for, writing the results after each configuration."""
    options = _options()
    known = {c.name: c for c in (*CONFIGURATIONS, *FURTHER)}
    chosen = [known[name] for name in options.configurations]
    results = read_results(options.resume) if options.resume else {}
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        for configuration in chosen:
            before = results.get(configuration.name, Result(caches=""))
            results[configuration.name] = _measure(configuration, before, work, options)
            write_results(options.json, results)
    print(markdown(HEADER, throughput_rows(list(known.values()), results)))
    plot(list(known.values()), results, options.png)


def _options() -> argparse.Namespace:
    names, further = [c.name for c in CONFIGURATIONS], [c.name for c in FURTHER]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--configurations", nargs="+", default=names, choices=[*names, *further], metavar="NAME")
    parser.add_argument("--work", type=Path, help="folder for checkpoints and the disk tier; default: a temporary one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--baseline-batch-sizes", type=int, nargs="+", default=[8, 16, 32, 64, 128])
    parser.add_argument("--timeout", type=float, default=600, metavar="S", help="of each try of the baseline")
    parser.add_argument("--engine-timeout", type=float, default=7200, metavar="S", help="of each of our runs")
    parser.add_argument("--skip-baseline", action="store_true")
    parser.add_argument("--skip-engine", action="store_true")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="results of an earlier run, to add these to")
    parser.add_argument("--json", type=Path, default=Path("offload.json"))
    parser.add_argument("--png", type=Path, default=Path("offload.png"))
    return parser.parse_args()


def _measure(configuration: Configuration, before: Result, work: Path, options: argparse.Namespace) -> Result:
    """The sides that are not skipped; of the others what was known before."""
    recipe = engine.prepare(configuration, work)
    result = replace(before, caches=_prepare_caches(configuration))
    if not options.skip_engine:
        runs, note = _engine_runs(configuration, recipe, work, options)
        result = replace(result, engine=tuple(runs), engine_note=note)
    if not options.skip_baseline:
        folder = checkpoint_folder(work, configuration.model)
        result = replace(result, baseline=tuple(_baseline_tries(configuration, folder, options)))
    return result


def _prepare_caches(configuration: Configuration) -> str:
    """Unless a GPU computes: then no file is read once the clock runs. What to call their state."""
    return "warm" if configuration.gpu else drop_page_cache()


def _engine_runs(
    configuration: Configuration, recipe: Path, work: Path, options: argparse.Namespace
) -> tuple[list[EngineRun], str]:
    """The runs that finished, and why the last one did not."""
    runs: list[EngineRun] = []
    for number in range(1, options.repeats + 1):
        say(f"{configuration.name}: rates")
        before = engine.measure_rates(configuration, work)
        _prepare_caches(configuration)
        say(f"{configuration.name}: our run {number} of {options.repeats}")
        outcome = engine.run(configuration, recipe, limit_s=options.engine_timeout)
        say(f"{configuration.name}: {engine.describe(outcome)}")
        if not isinstance(outcome, Done):
            return runs, str(outcome)
        say(f"{configuration.name}: rates once more")
        rates = before.between(engine.measure_rates(configuration, work))
        runs.append(EngineRun(metrics=outcome.answer, peak_bytes=outcome.peak_bytes, rates=rates))
        say(f"{configuration.name}: roofline {roofline_tokens_per_s(configuration, runs[-1]):.2f} tokens/s")
    return runs, ""


def _baseline_tries(configuration: Configuration, folder: Path, options: argparse.Namespace) -> Iterator[BaselineTry]:
    """Every batch size once, until one does not finish: larger ones need more memory. Then the best one again."""
    tries = []
    for batch_size in options.baseline_batch_sizes:
        tries.append(_baseline_try(configuration, folder, batch_size, options.timeout))
        yield tries[-1]
        if tries[-1].note:
            break
    best = Result(caches="", baseline=tuple(tries)).best_batch_size
    for _ in range(options.repeats - 1 if best is not None else 0):
        assert best is not None
        yield _baseline_try(configuration, folder, best, options.timeout)


def _baseline_try(configuration: Configuration, folder: Path, batch_size: int, limit_s: float) -> BaselineTry:
    c = configuration
    _prepare_caches(c)
    say(f"{c.name}: baseline, batch {batch_size}")
    numbers: Sequence[int] = (batch_size, c.prompt_tokens, c.new_tokens)
    command = ["-m", "throughput.baseline", str(folder), *map(str, numbers)]
    command += [str(c.cap_nbytes)] if c.gpu else []
    outcome = run_capped(command, c.cap(), limit_s=limit_s)
    if not isinstance(outcome, Done):
        say(f"{c.name}: baseline, batch {batch_size}: {outcome}")
        return BaselineTry(batch_size=batch_size, tokens_per_s=0, note=str(outcome), peak_bytes=c.cap_nbytes)
    answer = {key: value for key, value in outcome.answer.items() if key != "load_s"}
    job = SampledJob(batch_size=batch_size, new_tokens=c.new_tokens, **answer)
    say(f"{c.name}: baseline, batch {batch_size}: {job.tokens_per_s:.2f} tokens/s, {job.step_s:.1f} s a step")
    return BaselineTry(batch_size=batch_size, tokens_per_s=job.tokens_per_s, note="", peak_bytes=outcome.peak_bytes)


if __name__ == "__main__":
    main()
