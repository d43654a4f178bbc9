"""The built-in kernels compile for every architecture they are meant for, within what it has."""

from __future__ import annotations

from pathlib import Path

SCRIPT = Path(__file__).with_name("compiled.py")
SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""compute capability → bytes that a block may have (CUDA Programming Guide, December 2025, table 31)"""
