"""Attention's kernels, one file each."""
