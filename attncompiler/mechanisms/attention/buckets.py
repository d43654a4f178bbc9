"""Which bucket of measured tables a call of attention is in. Nothing here imports torch.

Kernels compete anew with every kind of pattern and every dtype, and in decoding. Within those their order moves, what
decides most first, with the width of a head, the size of a pattern's blocks, how many query heads share keys, how
sparse the pattern is, and the length. Batch and number of heads are left out: they move all kernels alike once the
device is full. So are segments and padding, which a plan does not know of.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from attncompiler.measured import Bucket
from attncompiler.mechanisms.attention.pairs import visible_pairs
from attncompiler.mechanisms.attention.pattern import Pattern
from attncompiler.mechanisms.base import MixerSize


def shapes(policy: Any, size: MixerSize) -> Mapping[str, tuple[int, ...]]:
    """The shapes of q, k and v in a layer of this policy."""
    tokens, K, M = (size.batch, size.seq_len), policy.kv_heads, size.hidden_size
    D, V = policy.key_width(M), policy.value_width(M)
    return {"q": (*tokens, policy.num_attention_heads, D), "k": (*tokens, K, D), "v": (*tokens, K, V)}


def bucket(shapes: Mapping[str, tuple[int, ...]], options: Any, dtype: str) -> Bucket:
    """The bucket of a call with q (B, T, H, D), k (B, S, K, D) and the pattern of `options`."""
    _, T, H, D = shapes["q"]
    S, K = shapes["k"][1:3]
    pattern: Pattern = options.pattern
    seen = max(1, visible_pairs(pattern, T, S)) / (T * S)
    return Bucket(
        dtype=dtype,
        kind=_kind(pattern),
        step=T == 1,
        levels={
            "width": (D - 1).bit_length(),  # rounded up, as kernels round it
            "block": _log2(getattr(pattern, "block_size", 1)),
            "group": _log2(H // K),
            "density": round(math.floor(-math.log(seen, 4))),  # 0 above a quarter of all pairs, 1 above a sixteenth, …
            "length": _log2(S),
        },
    )


def _kind(pattern: Pattern) -> str:
    """The pattern's, and what lets fewer kernels serve it: global tokens, and that it is not causal."""
    kind: str = pattern.kind
    if getattr(pattern, "global_tokens", 0):
        kind += " with globals"
    return kind if pattern.causal or kind == "full" else f"{kind} both ways"


def _log2(size: int) -> int:
    return size.bit_length() - 1
