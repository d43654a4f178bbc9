"""Plan: for one target, each layer's chain of kernels, what was refused and why, and what it will cost."""

from attncompiler.plan.explanation import explain
from attncompiler.plan.model import Plan, PlannedLayer, PlannedPolicy, RefusedKernel
from attncompiler.plan.planner import plan

__all__ = ["Plan", "PlannedLayer", "PlannedPolicy", "RefusedKernel", "explain", "plan"]
