"""The built-in GPU kernel: flash attention in Triton (`attention/flash`)."""

from __future__ import annotations

from attncompiler.runtime.implementation import compiled

KERNEL = compiled("attncompiler.mechanisms.attention.flash.kernel")
