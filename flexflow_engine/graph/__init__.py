"""The work of one step as a graph of tasks: what a task is, how steps become graphs, which graphs are legal."""
