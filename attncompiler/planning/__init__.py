"""Plan: for one target, each layer's chain of kernels, what was refused and why, and what it will cost."""

from attncompiler.planning.model import Plan, PlannedLayer, PlannedPolicy, RefusedKernel
from attncompiler.planning.planner import plan

__all__ = ["Plan", "PlannedLayer", "PlannedPolicy", "RefusedKernel", "plan"]
