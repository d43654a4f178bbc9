"""Faults of the kind that people make, each one edit of a source, for proofs that the fuzzer finds them."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType, ModuleType


@dataclass(frozen=True)
class Fault:
    """`new` where the source of a module has `old`."""

    name: str
    module: str
    """below attncompiler"""
    old: str
    new: str
    laws: tuple[str, ...] = ("kernels",)
    """one of which must be found broken"""


@contextmanager
def planted(fault: Fault) -> Iterator[None]:
    """The fault, while the context lasts: the functions of a copy of its module lend theirs their code.

    Whoever imported them runs the copy's code so, and no one has to be told. The edit must fit at one place alone.
    """
    module = importlib.import_module(f"attncompiler.{fault.module}")
    source = Path(str(module.__file__)).read_text(encoding="utf-8")
    assert source.count(fault.old) == 1, f"{fault.name}: fits {source.count(fault.old)} places"
    code = compile(source.replace(fault.old, fault.new), str(module.__file__), "exec", dont_inherit=True)
    faulty = dict(_codes(code))
    functions = {function.__code__.co_qualname: function for function in _functions(module)}
    common = functions.keys() & faulty.keys()
    changed = {name: functions[name] for name in common if functions[name].__code__ != faulty[name]}
    assert changed, f"{fault.name}: no function differs"
    kept = {name: function.__code__ for name, function in changed.items()}
    for name, function in changed.items():
        function.__code__ = faulty[name]
    try:
        yield
    finally:
        for name, function in changed.items():
            function.__code__ = kept[name]


def _codes(code: CodeType) -> Iterator[tuple[str, CodeType]]:
    """The code of every function and class body below, by qualified name."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant.co_qualname, constant
            yield from _codes(constant)


def _functions(holder: ModuleType | type) -> Iterator[FunctionType]:
    """The functions that a module defines, with those of its classes."""
    module = holder.__name__ if isinstance(holder, ModuleType) else holder.__module__
    for value in vars(holder).values():
        if isinstance(value, type) and value.__module__ == module:
            yield from _functions(value)
            continue
        inner = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        inner = inspect.unwrap(inner) if callable(inner) else inner
        if isinstance(inner, FunctionType) and inner.__module__ == module:
            yield inner


ATTENTION, LINEAR, LINFORMER = "mechanisms.attention", "mechanisms.linear_attention", "mechanisms.linformer"
MAMBA, MAMBA2 = "mechanisms.mamba.kernels.chunkwise", "mechanisms.mamba2.kernels.chunkwise"

FAULTS = (
    Fault(
        "a window off by one",
        f"{ATTENTION}.tiles",
        "        seen = pattern_visible(self.pattern, *pair, layer=self.layer, lengths=lengths)\n",
        "        seen = pattern_visible(self.pattern, *pair, layer=self.layer, lengths=lengths)\n"
        "        window = getattr(self.pattern, 'window', None)\n"
        "        if window is not None and isinstance(self.pattern, SlidingWindow):\n"
        "            seen = seen & ((pair[0] - pair[1] != window - 1) | (pair[1] < self.pattern.global_tokens))\n",
    ),
    Fault(
        "a softcap dropped",
        f"{ATTENTION}.kernels.chunkwise",
        "return scores if self.options.softcap is None else scores.tanh_()",
        "return scores",
    ),
    Fault(
        "softcap's slope dropped in the backward",
        f"{ATTENTION}.kernels.chunkwise",
        "dscores.addcmul_(dscores * scores, scores, value=-1)",
        "pass",
    ),
    Fault("a key mask ignored", f"{ATTENTION}.tiles", "seen = seen & queries & keys", "seen = seen & queries"),
    Fault("segments ignored", f"{ATTENTION}.tiles", "seen = seen & (queries == keys)", "pass"),
    Fault(
        "a scale of 1.01",
        f"{ATTENTION}.kernels.chunkwise",
        "self.grouped(self.q, block) * (self.scale * self.unit)",
        "self.grouped(self.q, block) * (1.01 * self.scale * self.unit)",
    ),
    Fault(
        "a scale of 1.01 in one gradient",
        f"{ATTENTION}.kernels.chunkwise",
        "dqueries.mul_(call.scale)",
        "dqueries.mul_(1.01 * call.scale)",
    ),
    Fault(
        "keys of another group",
        f"{ATTENTION}.kernels.chunkwise",
        "rows.reshape(-1, block.length, self.kv_heads, self.group, rows.shape[-1]).permute(0, 2, 3, 1, 4)",
        "rows.reshape(-1, block.length, self.group, self.kv_heads, rows.shape[-1]).permute(0, 3, 2, 1, 4)",
    ),
    Fault("a sink that takes no share", f"{ATTENTION}.sinks", "return (out * share", "return (out * share.sign()"),
    Fault(
        "distances with a sign",
        f"{ATTENTION}.tiles",
        "return (queries - keys).abs().to(dtype)",
        "return (queries - keys).to(dtype)",
    ),
    Fault("dropout that does not scale its gradient", f"{ATTENTION}.kernels.chunkwise", "dscores.mul_(keep)", "pass"),
    Fault(
        "one query that sees one key less",
        f"{ATTENTION}.one_query",
        "scores.masked_fill_(~seen[:, None], -torch.inf)",
        "scores.masked_fill_(~(seen & seen.roll(-1, -1) | (seen.sum(-1, keepdim=True) < 2))[:, None], -torch.inf)",
    ),
    Fault(
        "an epsilon in the wrong place",
        f"{LINEAR}.kernels.chunkwise",
        "            normalizer[:] = sums.values[..., -1] + options.eps\n            result /= normalizer[..., None]",
        "            normalizer[:] = sums.values[..., -1] + options.eps\n"
        "            result = result / sums.values[..., -1:] + options.eps",
    ),
    Fault(
        "sums not reset at a segment",
        f"{LINEAR}.weights",
        "            entering = (self.runs == self.bounds[:, :-1, None])[:, None]\n",
        "            entering = torch.ones_like(self.runs, dtype=torch.bool)[:, None]\n",
    ),
    Fault(
        "a decay one token late",
        f"{LINEAR}.weights",
        "between = (self.decays[..., None] * _strictly_lower(self.size.C, self.decays)).cumsum(-2)",
        "between = (self.decays[..., None] * _strictly_lower(self.size.C, self.decays).tril(-2)).cumsum(-2)",
    ),
    Fault(
        "a stabiliser that is left out of one sum",
        f"{LINEAR}.sums",
        "state = State(states[:, :, -1], None if span.across.m is None else span.across.m[..., -1])",
        "state = State(states[:, :, -1], None if span.across.m is None else span.across.m[..., 0])",
    ),
    Fault(
        "a state not reset at a segment",
        MAMBA,
        "            decay.masked_fill_(self.starts[rows], 0)\n",
        "            pass\n",
    ),
    Fault(
        "a bias behind the softplus",
        MAMBA,
        "        raw = raw if self.bias is None else raw.add_(self.bias)\n"
        "        delta = F.softplus(raw, threshold=40) if self.options.dt_softplus else raw.clone()\n",
        "        delta = F.softplus(raw, threshold=40) if self.options.dt_softplus else raw.clone()\n"
        "        delta = delta if self.bias is None else delta + self.bias\n",
    ),
    Fault(
        "a gradient that is not carried between chunks",
        MAMBA,
        "    return decays[0] * steps[0]",
        "    return 0 * steps[0]",
    ),
    Fault(
        "a state that a whole chunk does not fade",
        MAMBA2,
        "            from_start.masked_fill_(runs != before[:, :, None, None], 0)\n",
        "            pass\n",
    ),
    Fault(
        "a gradient where the time step is clamped",
        MAMBA2,
        "    d_raw = torch.where((stepped >= low) & (stepped <= high), d_raw, 0)\n",
        "    pass\n",
    ),
    Fault(
        "padding that is projected",
        f"{LINFORMER}.documents",
        "        return x.flatten(0, 1)[self.index].masked_fill_(~self._real(x), 0)",
        "        return x.flatten(0, 1)[self.index]",
    ),
    Fault(
        "a document that loses its last token",
        f"{LINFORMER}.documents",
        "    return first, last - first + 1",
        "    return first, last - first",
    ),
    Fault(
        "a ring that forgets its first tokens",
        f"{ATTENTION}.state",
        "        return position if position < first else first + (position - first) % self.ring",
        "        return position % self.slots",
        laws=("steps",),
    ),
    Fault(
        "a convolution that forgets",
        "blocks.convolution",
        "        last = joined[:, follows.shape[1] :]\n",
        "        last = torch.zeros_like(joined[:, follows.shape[1] :])\n",
        laws=("steps",),
    ),
)
"""Of kernels, forward and backward; the last two are of what lies around them."""
