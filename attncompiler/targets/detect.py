"""The machine at hand, as a target and an environment.

Nothing here imports torch unless a GPU is asked for: a CPU is described by what the operating system says of it.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from types import MappingProxyType

from attncompiler import targets
from attncompiler.targets.target import Target

GHZ = 1e9


@dataclass(frozen=True, slots=True)
class Environment:
    """What is installed where models are emitted."""

    packages: Mapping[str, str]
    """import names, and the names of what was installed (as "flash-attn-4"), to versions"""
    python: str
    system: str
    """operating system and machine, such as "Linux x86_64\""""
    interpreting: bool = False
    """whether Triton, where it is loaded, runs kernels by its interpreter on a CPU, to be tested"""


@cache
def detect_environment() -> Environment:
    """What is installed, read from package metadata; none of the packages is imported."""
    found = {}
    for name, distributions in sorted(metadata.packages_distributions().items()):
        if name.isidentifier():
            found[name] = metadata.version(distributions[0])
            # several distributions may share one import name, as flash-attn and flash-attn-4 do
            found |= {re.sub(r"[-_.]+", "-", each).lower(): metadata.version(each) for each in distributions}
    return Environment(
        MappingProxyType(found),
        platform.python_version(),
        f"{platform.system()} {platform.machine()}",
        interpreting="triton" in sys.modules and bool(sys.modules["triton"].knobs.runtime.interpret),
    )


def detect_target(device_type: str | None = None) -> Target:
    """The device at hand: that of the given type, or a GPU where torch sees one and the CPU elsewhere.

    Raises SpecError (E107) when the device type is not offered, or when no device of that type is present.
    """
    if device_type == "cpu":
        return _cpu()
    if device_type in (None, "cuda"):
        found = _cuda()
        if found is not None:
            return found
        if device_type is None:
            return _cpu()
        raise targets.unknown("torch sees no 'cuda' device on this machine")
    raise targets.unknown(f"the device type {device_type!r} is not offered; only 'cpu' and 'cuda' are")


# --- the CPU ----------------------------------------------------------------------------------------------------


@cache
def _cpu() -> Target:
    """This machine's processor. Rates are peaks computed from cores, clock and vector width, not measured."""
    base = targets.get("cpu")
    info = _read("/proc/cpuinfo")
    cores = _cores()
    # two fused multiply-add units, two FLOP each, `width` fp32 lanes
    width = 16 if "avx512f" in info else 8 if "avx2" in info else 4
    clock = float(m.group(1)) / 1e3 if (m := re.search(r"cpu MHz\s*:\s*([\d.]+)", info)) else 2.5
    fp32 = cores * clock * GHZ * 4 * width
    low = fp32 * 16 if "amx_bf16" in info else fp32 * 2 if "avx512_bf16" in info else fp32
    title = m.group(1).strip() if (m := re.search(r"model name\s*:\s*(.+)", info)) else platform.machine() or base.title
    return base.model_copy(
        update={
            "title": f"{title}, {cores} cores",
            "memory_bytes": _memory() or base.memory_bytes,
            # a core alone cannot draw more than about this from memory; a whole socket no more than its channels give
            "bandwidth": min(base.bandwidth, cores * 12e9),
            "matrix_flops": {"float64": fp32 / 2, "float32": fp32, "bfloat16": low, "float16": fp32},
            "vector_flops": fp32,
            "multiprocessors": cores,
        }
    )


def _cores() -> int:
    """Processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> int | None:
    """Main memory in bytes: what the machine has, or what this process's control group allows, when that is less."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    return min(total, int(limit)) if limit.isdecimal() else total


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


# --- a GPU ------------------------------------------------------------------------------------------------------


def _cuda() -> Target | None:
    """The first device torch calls cuda: a built-in target with the device's own memory, or facts by capability."""
    try:
        import torch
    except ModuleNotFoundError:
        return None
    if not torch.cuda.is_available():
        return None
    seen = torch.cuda.get_device_properties(torch.cuda.current_device())
    vendor = "amd" if torch.version.hip else "nvidia"
    capability = None if torch.version.hip else (seen.major, seen.minor)
    base = nearest(seen.name, vendor, capability, seen.total_memory)
    known = base is not None and _matches(base, seen.name)
    base = base or targets.get("t4")
    share = 1.0 if known else seen.multi_processor_count / base.multiprocessors
    name = base.name if known else re.sub(r"[^a-z0-9]+", "-", seen.name.lower()).strip("-")
    return base.model_copy(
        update={
            "name": name,
            "title": seen.name,
            "vendor": vendor,
            "memory_bytes": seen.total_memory,
            "matrix_flops": {dtype: rate * share for dtype, rate in base.matrix_flops.items()},
            "vector_flops": base.vector_flops * share,
            "multiprocessors": seen.multi_processor_count,
            "compute_capability": capability,
            "shared_memory_bytes": getattr(seen, "shared_memory_per_block_optin", None) or base.shared_memory_bytes,
        }
    )


def nearest(device: str, vendor: str, capability: tuple[int, int] | None, memory: int) -> Target | None:
    """The built-in target that a device is, by name, or the one that is most like it: same capability, near memory."""
    kin = [target for name in targets.names() if (target := targets.get(name)).device_type == "cuda"]
    kin = [target for target in kin if target.vendor == vendor]
    named = [target for target in kin if _matches(target, device)]
    older = [target for target in kin if capability is None or (target.compute_capability or (0, 0)) <= capability]
    newest = max((target.compute_capability or (0, 0) for target in older), default=None)
    choices = named or [target for target in older if (target.compute_capability or (0, 0)) == newest]
    return min(choices, key=lambda target: abs(target.memory_bytes - memory), default=None)


def _matches(target: Target, device: str) -> bool:
    """Whether the device's name holds the target's model word: "NVIDIA A100-SXM4-80GB" is an a100."""
    words = re.findall(r"[a-z]+\d+[a-z]*|\d{4}", device.lower())
    model = target.name.removeprefix("rtx").split("-")[0]
    return model in words
