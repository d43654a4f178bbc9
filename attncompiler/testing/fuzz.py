"""The fuzzer: specs and batches drawn, built and held to the laws; a failure shrunk and written down.

Draws come from `strategies`, laws from `model_laws`. The engine is hypothesis; the same seed gives the same draws.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings

from attncompiler.errors import KernelError, SpecError, UsageError, fail
from attncompiler.spec import ModelSpec, read
from attncompiler.spec.dump import given as written
from attncompiler.testing.model_laws import LAWS, Broken, Subject
from attncompiler.testing.strategies import Inputs, inputs_for, specs

EXAMPLES = 100
"""drawn where neither examples nor seconds are given"""
UNLIMITED = 10**9
BATCH = 8
"""Examples that one search of hypothesis draws: later ones of a search are made of earlier ones, and more of them would
be much alike. What was drawn before is not counted again."""
STALE = 50
"""searches in a row without anything new, after which there is nothing more to draw"""
SHRINKING_SECONDS = 60.0
"""after a failure is found, for the search of a smaller one"""
MARK = "# replay: "
"""begins the line of a failure's file that holds the batch, as JSON"""


@dataclass(frozen=True)
class Failure:
    """The smallest spec and batch found for which a law does not hold."""

    broken: Broken
    inputs: Inputs

    @property
    def text(self) -> str:
        """The spec, with what it names alone."""
        return written(self.inputs.spec)

    @property
    def size(self) -> tuple[int, int, str]:
        return len(self.text), self.inputs.batch * self.inputs.length, self.text


@dataclass
class Report:
    """What a run did: examples held up, calls of kernels judged, refusals in words, and the failure, if any."""

    seed: int
    device: str
    examples: int = 0
    calls: int = 0
    refused: int = 0
    mechanisms: Counter[str] = field(default_factory=Counter)
    """examples by the mechanisms in them"""
    seconds: float = 0.0
    failure: Failure | None = None
    path: Path | None = None
    """the failure's file"""

    @property
    def replay(self) -> str | None:
        """The command that runs the failure again."""
        if self.path is None:
            return None
        device = "" if self.device == "cpu" else f" --device {self.device}"
        return f"attncompiler fuzz --replay {shlex.quote(str(self.path))}{device}"


class _TimeIsUp(BaseException):
    """Ends a run from inside an example; hypothesis lets it through."""


class _Falsified(AssertionError):
    """A law does not hold."""


def fuzz(
    base: ModelSpec | None = None,
    *,
    examples: int | None = None,
    seconds: float | None = None,
    seed: int = 0,
    device: str = "cpu",
    folder: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Hold drawn specs to the laws until one is broken, `examples` are done, or `seconds` have passed.

    With `base` the specs stay near to it (`strategies.specs`). `examples` default to 100, or with `seconds` to no
    limit. A failure is shrunk, for at most a minute more, and with `folder` written there (`record`); `progress` is
    told what is being done. The same seed gives the same draws.
    """
    if examples is None:
        examples = EXAMPLES if seconds is None else UNLIMITED
    until = float("inf") if seconds is None else time.monotonic() + seconds
    run = _Run(Report(seed, device), examples, until, progress)
    _drive(run, base, seed)
    run.report.seconds = time.monotonic() - run.started
    if run.report.failure is not None and folder is not None:
        run.report.path = record(run.report.failure, folder, seed=seed, device=device)
    return run.report


def examine(inputs: Inputs, *, device: str = "cpu", law: str | None = None) -> tuple[Broken | None, Subject]:
    """The first law that does not hold for the model of a batch's spec, or None; of the named law alone, if one is.

    Whatever is raised on the way breaks the law "runs". A refusal in words (E501) breaks none.
    """
    subject = Subject(inputs, device)
    try:
        with _quiet():
            for name, check in LAWS.items():
                if law in (None, name, "runs"):
                    for broken in check(subject):
                        return broken, subject
    except KernelError as error:
        if "failed with" in str(error):
            return Broken("runs", type(error).__name__, str(error)), subject
        subject.refused = True
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what was looked for
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{type(error).__name__} in {Path(last.filename).name}:{last.name}"
        return Broken("runs", place, str(error) or repr(error)), subject
    return None, subject


@contextmanager
def _quiet() -> Iterator[None]:
    """A kernel that fails is found in the record of its site, and is no warning here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclass
class _Run:
    """The state of one run, which every example adds to."""

    report: Report
    examples: int
    """at most"""
    until: float
    progress: Callable[[str], None]
    started: float = field(default_factory=time.monotonic)
    seen: set[bytes] = field(default_factory=set)

    def __call__(self, inputs: Inputs) -> None:
        report, found = self.report, self.report.failure
        if time.monotonic() > self.until:
            raise _TimeIsUp
        if found is None:
            digest = _digest(inputs)
            if digest in self.seen or report.examples == self.examples:
                return
            self.seen.add(digest)
        broken, subject = examine(inputs, device=report.device, law=found.broken.law if found else None)
        if found is None:
            report.examples += 1
            report.calls += subject.judged
            report.refused += subject.refused
            report.mechanisms.update({layer.policy.kind for layer in inputs.spec.resolved_layers})
            self.progress(f"{report.examples} examples, {report.calls} calls of kernels judged")
        if broken is None:
            return
        failure = Failure(broken, inputs)
        if found is None:
            self.until = time.monotonic() + SHRINKING_SECONDS
        if found is None or failure.size < found.size:
            report.failure = failure
            self.progress(f"shrinking: {broken.law} broken, a spec of {len(failure.text)} characters")
        raise _Falsified(str(broken))


def _drive(run: _Run, base: ModelSpec | None, chosen: int) -> None:
    drawn = specs(base, device=run.report.device).flatmap(inputs_for)
    search = stale = 0
    while run.report.examples < run.examples and stale < STALE:
        before = run.report.examples

        @seed((chosen << 32) + search)
        @settings(
            max_examples=BATCH,
            database=None,
            deadline=None,
            derandomize=False,
            phases=(Phase.generate, Phase.shrink),
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
            verbosity=Verbosity.quiet,
        )
        @given(drawn)
        def hold(inputs: Inputs) -> None:
            run(inputs)

        try:
            hold()
        except (_Falsified, _TimeIsUp):
            return
        search, stale = search + 1, 0 if run.report.examples > before else stale + 1


# --- failures on disk ---------------------------------------------------------------------------------------------


def record(failure: Failure, folder: Path, *, seed: int, device: str) -> Path:
    """Write a failure as a spec with comments, beside those that are there already. Raises OSError."""
    digest = _digest(failure.inputs)[:4].hex()
    replay = {"law": failure.broken.law, "device": device, "seed": seed, "inputs": failure.inputs.plain()}
    lines = [
        f"# {_one_line(failure.broken)}",
        f"# found by attncompiler fuzz --seed {seed}; run it again with attncompiler fuzz --replay FILE",
        MARK + json.dumps(replay),
        failure.text,
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(1, 1000):
        path = folder / f"{failure.broken.law}-{digest}{f'-{number}' if number > 1 else ''}.yaml"
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write("\n".join(lines))
            return path
        except FileExistsError:
            continue
    raise fail(UsageError, "E601", f"{folder} holds this failure a thousand times")


def _digest(inputs: Inputs) -> bytes:
    return hashlib.blake2b(f"{written(inputs.spec)}{inputs!r}".encode(), digest_size=16).digest()


def _one_line(broken: Broken) -> str:
    return " ".join(str(broken).split())


def replay(path: Path, *, device: str | None = None) -> Broken | None:
    """Run a failure's file again: what is still broken of its law.

    Raises SpecError where the file is no spec, or its line of the batch cannot be read; UsageError (E602) where it has
    none.
    """
    spec = read(path)
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(MARK):
            try:
                noted: dict[str, Any] = json.loads(line.removeprefix(MARK))
                inputs = Inputs.of(spec, noted["inputs"])
                law, own = noted["law"], noted["device"]
            except (ValueError, TypeError, KeyError) as error:
                raise fail(SpecError, "E003", f"{path}: the line {MARK.strip()!r} cannot be read: {error}") from None
            return examine(inputs, device=device or own, law=law)[0]
    raise fail(UsageError, "E602", f"{path} has no line {MARK.strip()!r}: it was not written by fuzz")
