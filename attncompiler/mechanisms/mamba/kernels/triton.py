"""The built-in GPU kernel: the scan in Triton (`recurrence/`)."""

from __future__ import annotations

from attncompiler.runtime.implementation import compiled

KERNEL = compiled("attncompiler.mechanisms.mamba.recurrence.kernel")
