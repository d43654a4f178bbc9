"""Numbers as people read them."""

from __future__ import annotations


def si(value: float) -> str:
    """With a prefix of 1000: 1234567 → "1.23 M", with a space for the unit to follow."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(value) < 999.5:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} E"


def gib(count: float) -> str:
    """Bytes in GiB, or in MiB below a tenth of one."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.1f} MiB"


def seconds(value: float) -> str:
    """Seconds, milliseconds or microseconds, in three digits."""
    for scale, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if value * scale >= 1:
            return f"{value * scale:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"
