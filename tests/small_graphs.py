"""Tasks and graphs written by hand, for whoever runs them without caring what they do."""

from __future__ import annotations

from collections.abc import Iterable

import networkx as nx

from flexflow_engine.abc.step import BatchStep
from flexflow_engine.graph.builder import TaskGraph
from flexflow_engine.graph.task import FetchTokens, Task, Tile


def task(name: str, lane: str, step: int = 0) -> Task:
    return Task(
        key=f"{step}/0/0/{name}",
        kind="load",
        tile=Tile(step, 0, 0),
        lane=lane,
        operation=FetchTokens(BatchStep(0, ())),
        reads=(),
        writes=(),
    )


def graph(tasks: Iterable[Task], edges: Iterable[tuple[Task, Task]] = ()) -> TaskGraph:
    tasks = tuple(tasks)
    digraph: nx.DiGraph[str] = nx.DiGraph()
    digraph.add_nodes_from((t.key, {"task": t}) for t in tasks)
    digraph.add_edges_from((a.key, b.key) for a, b in edges)
    return TaskGraph(tasks[0].tile.step, tasks, digraph)
