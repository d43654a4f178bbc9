"""The operators as functions, for people who write their own layers: one for each mechanism, and `block_lists`.

Each operator takes `kernel="auto"`, a kernel's name, or the list of the only kernels allowed; each is differentiable,
works under torch.compile, and raises an InputError that says which argument does not fit.
`help(attncompiler.ops.attention)` gives shapes and sources; `dir(attncompiler.ops)` lists what there is.
"""

from __future__ import annotations

from typing import Any

from attncompiler.mechanisms.base import discover, load_entry

_ENTRIES = {
    entry.partition(":")[2]: entry
    for mechanism in discover().values()
    for entry in (mechanism.function, *mechanism.helpers)
}

__all__ = sorted(_ENTRIES)


def __getattr__(name: str) -> Any:
    if name not in _ENTRIES:
        raise AttributeError(f"module 'attncompiler.ops' has no function {name!r}; there are {', '.join(__all__)}")
    return load_entry(_ENTRIES[name])


def __dir__() -> list[str]:
    return __all__
