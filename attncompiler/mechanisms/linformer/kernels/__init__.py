"""Linformer's kernels, one file each."""
