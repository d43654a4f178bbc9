"""What a pattern is to a device: made once, and kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

MOST = 256
"""Results of each function: a random pattern has lists of its own in every layer, and in both directions."""

P = ParamSpec("P")
Made = TypeVar("Made")


def kept(make: Callable[P, Made]) -> Callable[P, Made]:
    """`make`, asked once for the same arguments, one of which is the device; of more than `MOST` the first are dropped.

    What is kept has been computed: every stream may read it. So nothing is kept while a CUDA graph is captured, where
    what is made is recorded and no more.
    """
    found: dict[tuple[object, ...], Made] = {}

    @wraps(make)
    def get(*place: P.args, **named: P.kwargs) -> Made:
        assert not named
        made = found.get(place)
        if made is not None:
            return made
        made = make(*place, **named)
        device = next(each for each in place if isinstance(each, torch.device))
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return made
            torch.cuda.current_stream(device).synchronize()
        while len(found) >= MOST:
            found.pop(next(iter(found)), None)
        found[place] = made
        return made

    return get
