"""Steps of small jobs, compiled, and their tasks."""

from __future__ import annotations

from collections.abc import Mapping

from hypothesis import strategies as st

from flexflow_engine.abc.tier import Tier
from flexflow_engine.graph.builder import TaskGraph
from flexflow_engine.graph.task import Task
from flexflow_engine.placement.layout import Layout
from harness import policy
from layouts import (
    DEVICE_FAR,
    compile_steps,
    compose,
    lay_out,
    opt,
    policies,
    setups,
)

Classes = Mapping[str, type[Tier]]

MODELS = {"tied": opt(), "untied": opt(tie_word_embeddings=False, word_embed_proj_dim=32, do_layer_norm_before=False)}


def all_far(classes: Classes = DEVICE_FAR, *, num_gpu_batches: int = 2, kv_page_tokens: int = 4) -> Layout:
    """Two rows a GPU batch, every class on the last tier."""
    last = {list(classes)[-1]: 100.0}
    chosen = policy(
        setups(classes),
        gpu_batch_size=2,
        num_gpu_batches=num_gpu_batches,
        weights=last,
        kv_cache=last,
        activations=last,
        kv_page_tokens=kv_page_tokens,
    )
    return lay_out(MODELS["tied"], classes, chosen, prompt_tokens=(9,) * 2 * num_gpu_batches)


def steps_of(layout: Layout, count: int = 3) -> list[TaskGraph]:
    rows = layout.policy.gpu_batch_size * layout.policy.num_gpu_batches
    return compile_steps(layout, compose(layout, (9,) * rows, 6, limit=count))


def find(graph: TaskGraph, *, kind: str, layer: int, gpu_batch: int, name: str = "") -> list[Task]:
    """The tasks of a tile in emission order; `name` is how their names begin."""
    return [
        task
        for task in graph.tasks
        if (task.kind, task.tile.layer, task.tile.gpu_batch) == (kind, layer, gpu_batch)
        and task.key.split("/", 3)[3].startswith(name)
    ]


def compute_of(graph: TaskGraph, layer: int, gpu_batch: int) -> Task:
    (task,) = find(graph, kind="compute", layer=layer, gpu_batch=gpu_batch)
    return task


def draw_job(data: st.DataObject, classes: Classes, model: str) -> tuple[Layout, list[TaskGraph]]:
    chosen = data.draw(policies(classes))
    prompts = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=12))
    max_new_tokens = data.draw(st.integers(1, 5))
    layout = lay_out(MODELS[model], classes, chosen, prompt_tokens=prompts, max_new_tokens=max_new_tokens)
    return layout, compile_steps(layout, compose(layout, prompts, max_new_tokens, limit=4))
