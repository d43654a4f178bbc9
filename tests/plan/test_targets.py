"""Targets: every file is valid and says its sources; what is detected is this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import resources

import pytest
import yaml
from pydantic import ValidationError

from attncompiler import targets
from attncompiler.errors import SpecError
from attncompiler.targets.detect import detect_environment, detect_target, nearest
from attncompiler.targets.target import Target

NAMED = {
    *("cpu", "t4", "rtx3090", "a5000", "a6000", "rtx4090", "l4", "l40s"),
    *("a100-40", "a100-80", "h100", "h200", "b200", "mi300x"),
}


def test_every_promised_target_is_built_in() -> None:
    assert set(targets.names()) == NAMED


@pytest.mark.parametrize("name", targets.names())
def test_a_target_is_named_as_its_file_and_its_rates_are_ordered(name: str) -> None:
    target = targets.get(name)
    assert target.name == name == str(target)
    rates = target.matrix_flops
    assert set(rates) == {"float64", "float32", "bfloat16", "float16"}
    assert rates["float64"] <= rates["float32"] <= rates["bfloat16"] <= rates["float16"]
    assert Target.model_validate_json(target.model_dump_json()) == target


@pytest.mark.parametrize("name", targets.names())
def test_every_target_names_a_dated_source(name: str) -> None:
    text = resources.files("attncompiler.targets").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    comments = [line.partition("#")[2] for line in text.splitlines() if "#" in line]
    assert any(
        f"(20{year:02d})" in comment or f" 20{year:02d})" in comment for comment in comments for year in range(17, 27)
    )
    assert yaml.safe_load(text)["name"] == name


def test_memory_is_that_of_the_product() -> None:
    sizes = {"a5000": 24, "a6000": 48, "a100-40": 40, "a100-80": 80, "h200": 141, "t4": 16}
    assert {name: targets.get(name).memory_bytes / 2**30 for name in sizes} == sizes


@pytest.mark.parametrize(("asked", "hint"), [("h20", "h200"), ("A6000", "a6000"), ("zzz", "known targets: a100-40")])
def test_an_unknown_target_is_an_error_that_helps(asked: str, hint: str) -> None:
    with pytest.raises(SpecError, match=rf"E107 unknown target '{asked}'.*{hint}"):
        targets.get(asked)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("field", ["bandwidth", "vector_flops", "interconnect", "matrix_flops"])
def test_a_rate_is_a_positive_number(field: str, rate: float) -> None:
    """Times are work over rates."""
    value = {"float32": rate} if field == "matrix_flops" else rate
    with pytest.raises(ValidationError):
        Target.model_validate({**targets.get("cpu").model_dump(), field: value})


def test_the_machine_at_hand() -> None:
    here = detect_target("cpu")
    assert here.device_type == "cpu"
    assert here.multiprocessors <= (os.cpu_count() or 1)
    assert 2**28 < here.memory_bytes < 2**46
    assert detect_target("cpu") == here


def test_a_device_that_is_not_there_is_an_error() -> None:
    import torch

    with pytest.raises(SpecError, match="E107 the device type 'tpu' is not offered"):
        detect_target("tpu")
    if torch.cuda.is_available():
        assert detect_target().device_type == "cuda"
    else:
        assert detect_target() == detect_target("cpu")
        with pytest.raises(SpecError, match="E107 torch sees no 'cuda' device"):
            detect_target("cuda")


@pytest.mark.parametrize(
    ("device", "vendor", "capability", "gigabytes", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "nvidia", (8, 0), 79, "a100-80"),
        ("NVIDIA A100-PCIE-40GB", "nvidia", (8, 0), 39, "a100-40"),
        ("NVIDIA H100 80GB HBM3", "nvidia", (9, 0), 79, "h100"),
        ("NVIDIA GeForce RTX 4090", "nvidia", (8, 9), 24, "rtx4090"),
        ("NVIDIA RTX A6000", "nvidia", (8, 6), 47, "a6000"),
        ("NVIDIA L40S", "nvidia", (8, 9), 44, "l40s"),
        ("Tesla T4", "nvidia", (7, 5), 15, "t4"),
        ("AMD Instinct MI300X", "amd", None, 191, "mi300x"),
        # not built in: the nearest of the newest capability that it has
        ("NVIDIA RTX 4000 Ada Generation", "nvidia", (8, 9), 20, "l4"),
        ("NVIDIA GeForce RTX 5090", "nvidia", (12, 0), 32, "b200"),
    ],
)
def test_a_gpu_is_known_by_its_name_or_its_nearest_kin(
    device: str, vendor: str, capability: tuple[int, int] | None, gigabytes: int, name: str
) -> None:
    found = nearest(device, vendor, capability, gigabytes * 2**30)
    assert found is not None
    assert found.name == name


def test_the_environment_is_read_without_importing_it() -> None:
    code = """
import sys
from attncompiler.targets.detect import detect_environment, detect_target
found = detect_environment()
detect_target("cpu")
assert found.packages["torch"] and found.packages["pydantic"]
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert detect_environment().python.startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
