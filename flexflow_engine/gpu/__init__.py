"""What kernels for a GPU are made of: `trying` finds out whether Triton works."""
