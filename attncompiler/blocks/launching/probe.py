"""Whether Triton can compile and launch anything at all on a device: it needs a C compiler, and a driver it knows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def one_kernel(out):
    """Writes 1."""
    tl.store(out, 1.0)


def failure(device: torch.device) -> str | None:
    """Why a kernel of one instruction does not run there; None where it does, or where work is recorded for later."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None
    try:
        out = torch.zeros(1, device=device)
        one_kernel[(1,)](out)
        written = float(out)
    except Exception as error:  # noqa: BLE001 (whatever it is, torch does without)
        return f"{type(error).__name__}: {error}"
    return None if written == 1 else f"a kernel that writes 1 has written {written}"
