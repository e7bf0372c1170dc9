"""Carries out task graphs: memory, tiles, attention, lanes and the trace of what happened when."""
