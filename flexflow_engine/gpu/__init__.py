"""For a GPU: `trying` finds out whether Triton works, `launching` starts its kernels, `settings` are torch's."""
