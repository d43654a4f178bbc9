"""Options and profiles that all tests share."""

from __future__ import annotations

import importlib
import os
import tempfile
from types import FunctionType, ModuleType

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "default",
    deadline=None,
    derandomize=os.environ.get("CI") == "true",
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("default")

# measured tables of whoever runs the tests do not count in them, nor in the processes they start
os.environ["XDG_CONFIG_HOME"] = tempfile.mkdtemp(prefix="attncompiler-tests-")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where kernels run: cpu or cuda")
    parser.addoption("--update-golden", action="store_true", help="write the golden files instead of comparing")


def pytest_configure(config: pytest.Config) -> None:
    # without a GPU its kernels are run by Triton's interpreter, which must know when it is first imported
    if config.getoption("--device") == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
        importlib.import_module("triton")
        replace_once_a_launch(importlib.import_module("triton.runtime.interpreter"))


def replace_once_a_launch(interpreter: ModuleType) -> None:
    """Triton's interpreter puts its own functions in the language's places when a kernel is launched, and looks for
    them all again at every call of a helper, which finds them replaced: most of the time of a kernel of many helpers.
    """
    replace, language = interpreter._patch_lang, interpreter.tl
    compiled = {each: each.static_range for each in (language, language.core)}

    def replaced(function: FunctionType) -> object:
        seen = [each for each in compiled if any(each is value for value in function.__globals__.values())]
        if seen and all(each.static_range is not compiled[each] for each in seen):
            return interpreter._LangPatchScope()  # with nothing to put back
        return replace(function)

    interpreter._patch_lang = replaced


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--device")
