"""The weak registry of sites: a handle that travels through graphs as a tensor finds its site's record here.

This is the one piece of module-level state in the package. Handles are random, so an exported program that reaches
another process meets no stranger's site: an unknown handle means that no site is known, and the mechanism's own
order applies.
"""

from __future__ import annotations

import secrets
import threading
import weakref
from collections import Counter

from attncompiler.mechanisms.base import Refusal
from attncompiler.runtime.context import Chain


class Record:
    """What a site may run, and what it ran: calls by (kernel, direction), refusals and failures by kernel."""

    def __init__(self, chain: Chain):
        self.chain = chain
        """the kernel whose backward is tried first, where that is not the first of the chain"""
        self.calls: Counter[tuple[str, str]] = Counter()
        self.refusals: dict[tuple[str, str], tuple[Refusal, ...]] = {}
        self.failures: dict[tuple[str, str], str] = {}
        self._lock = threading.Lock()

    def ran(self, kernel: str, direction: str) -> None:
        with self._lock:
            self.calls[kernel, direction] += 1

    def refused(self, kernel: str, direction: str, reasons: tuple[Refusal, ...]) -> None:
        with self._lock:
            self.refusals[kernel, direction] = reasons

    def failed(self, kernel: str, direction: str, cause: str) -> None:
        with self._lock:
            self.failures[kernel, direction] = cause


_records: weakref.WeakValueDictionary[int, Record] = weakref.WeakValueDictionary()


def register(record: Record) -> int:
    """A new random handle for `record`, which the registry holds weakly."""
    while (handle := secrets.randbits(62)) in _records or handle == 0:
        pass
    _records[handle] = record
    return handle


def find(handle: int) -> Record | None:
    """The record of a handle, or None when no living site has it."""
    return _records.get(handle)
