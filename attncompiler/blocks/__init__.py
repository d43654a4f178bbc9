"""Blocks: what a model has beside its mixers. Each module here is one visible node of an emitted graph."""
