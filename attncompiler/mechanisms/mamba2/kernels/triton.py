"""The built-in GPU kernel: passes of the gated recurrence in Triton (`recurrence/`)."""

from __future__ import annotations

from attncompiler.runtime.implementation import compiled

KERNEL = compiled("attncompiler.mechanisms.mamba2.recurrence.kernel")
