"""Linear attention's kernels, one file each."""
