"""The operators as functions, for people who write their own layers.

Each takes `kernel="auto"`, a kernel's name, or the list of the only kernels allowed; each is differentiable, works
under torch.compile, and raises an InputError that says which argument does not fit.
"""

from attncompiler.mechanisms.attention.op import attention
from attncompiler.mechanisms.linear_attention.op import linear_attention
from attncompiler.mechanisms.linformer.op import linformer
from attncompiler.mechanisms.mamba.op import selective_scan
from attncompiler.mechanisms.mamba2.op import ssd

__all__ = ["attention", "linear_attention", "linformer", "selective_scan", "ssd"]
