"""What the benchmarks share: checkpoints, capped child processes, measured rates, rooflines, tables."""
