"""The mechanisms: one folder each, found by `base.discover`, listed nowhere else."""
