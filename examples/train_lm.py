"""Train a byte-level language model, as a spec describes it, on the Python standard library's own source files.

    python examples/train_lm.py specs/hybrid_tiny.yaml --minutes 5
    python examples/train_lm.py specs/hybrid_tiny.yaml --steps 2000 --out runs/long
    python examples/train_lm.py specs/hybrid_tiny.yaml --steps 2000 --out runs/long --resume

The spec must be a causal language model with a vocabulary of at least 256. A run is a folder:

    loss.json     settings, corpus, and the losses so far, in nats per byte (plot_loss.py draws them)
    step-N/       the newest checkpoint: optimizer.safetensors, progress.json and model/, which attncompiler.load takes

On the way the loss is that of --eval-windows of the held-out text, and in the end that of all of it.

With --steps a resumed run has the losses of an unbroken one. With --minutes the learning rate follows the clock, which
counts everything since the start: building, evaluating and saving too.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from corpus import Corpus, read_standard_library
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import attncompiler

console = Console(soft_wrap=True)
EVALUATED = 16
"""windows evaluated at once in the end"""


@dataclass(frozen=True)
class Settings:
    """What a resumed run must share with the run it goes on from."""

    steps: int | None
    minutes: float | None
    batch_size: int
    seq_len: int
    lr: float
    warmup: int
    weight_decay: float
    clip: float
    eval_windows: int
    seed: int

    def done(self, step: int, seconds: float) -> float:
        """How much of the run is behind us, from 0 to 1: by steps when they are given, else by the clock."""
        if self.steps is not None:
            return min(1.0, step / self.steps)
        assert self.minutes is not None
        return min(1.0, seconds / (60 * self.minutes))

    def lr_at(self, step: int, done: float) -> float:
        """Linear warm-up, then half a cosine down to a twentieth."""
        return self.lr * min(1.0, (step + 1) / self.warmup) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def main(
    spec: Annotated[Path, typer.Argument(help="the YAML file of the model")],
    minutes: Annotated[float | None, typer.Option(help="stop after so many minutes (default 5)")] = None,
    steps: Annotated[int | None, typer.Option(help="stop after so many steps instead")] = None,
    batch_size: Annotated[int, typer.Option(help="windows in a step")] = 2,
    seq_len: Annotated[int, typer.Option(help="bytes in a window")] = 512,
    lr: Annotated[float, typer.Option(help="highest learning rate")] = 2e-3,
    warmup: Annotated[int, typer.Option(help="steps until it is reached")] = 300,
    weight_decay: Annotated[float, typer.Option(help="of matrices")] = 0.1,
    clip: Annotated[float, typer.Option(help="largest norm of the gradient")] = 1.0,
    eval_every: Annotated[int, typer.Option(help="steps between held-out losses")] = 50,
    eval_windows: Annotated[int, typer.Option(help="held-out windows of each")] = 32,
    save_every: Annotated[int, typer.Option(help="steps between checkpoints; one more at the end")] = 200,
    out: Annotated[Path | None, typer.Option(help="folder of the run (default runs/<name of the spec>)")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on from the newest checkpoint in the folder, if any")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda (default: what is there)")] = None,
    seed: Annotated[int, typer.Option(help="of the order of the training windows")] = 0,
    max_files: Annotated[int | None, typer.Option(help="read only so many source files")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="replace a value of the spec: key.path=value")
    ] = None,
) -> None:
    """Train a byte-level language model on the standard library's source files."""
    started = time.perf_counter()
    if steps is not None and minutes is not None:
        raise typer.BadParameter("give --steps or --minutes, not both")
    if (minutes is not None and minutes <= 0) or (steps is not None and steps < 1):
        raise typer.BadParameter("--minutes must be above 0, and --steps at least 1")
    minutes = 5.0 if steps is None and minutes is None else minutes
    settings = Settings(steps, minutes, batch_size, seq_len, lr, warmup, weight_decay, clip, eval_windows, seed)

    model_spec = attncompiler.check(spec, overrides=overrides or ())
    if model_spec.model.head.kind != "lm" or (model_spec.model.vocab_size or 0) < 256:
        raise typer.BadParameter(f"{spec} is not a language model with a vocabulary of 256 bytes or more")
    corpus = read_standard_library(max_files=max_files)
    out = out or Path("runs") / model_spec.name
    checkpoint = newest_checkpoint(out)
    if checkpoint is not None and not resume:
        raise typer.BadParameter(f"{out} holds a run: --resume goes on with it, --out names another folder")

    if checkpoint is None:
        model = attncompiler.build(model_spec, device=device)
        log = {
            "name": model_spec.name,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "settings": asdict(settings),
            "corpus": {
                "sha256": corpus.sha256,
                "files": corpus.files,
                "train_bytes": len(corpus.train),
                "held_out_bytes": len(corpus.held_out),
                "bigram_loss": corpus.bigram_loss(*corpus.all_held_out(seq_len)),
            },
            "machine": {"torch": torch.__version__, "threads": torch.get_num_threads()},
            "train": [],
            "held_out": [],
        }
        step, seconds_before = 0, 0.0
    else:
        model = attncompiler.load(checkpoint / "model", device=device)
        progress = json.loads((checkpoint / "progress.json").read_text())
        log, step, seconds_before = progress["log"], progress["step"], progress["seconds"]
        refuse_differences(model.spec == model_spec, log, settings, corpus)
    model.init_state(
        batch=1, max_length=1
    )  # a model that reads ahead cannot be stepped: it is refused here, with reasons
    optimizer = torch.optim.AdamW(attncompiler.param_groups(model, weight_decay), lr=lr, betas=(0.9, 0.95), fused=True)
    if checkpoint is not None:
        restore_optimizer(optimizer, model, checkpoint / "optimizer.safetensors")
    where = next(model.parameters()).device
    held_out = [tensor.to(where) for tensor in corpus.held_out_windows(eval_windows, seq_len)]
    console.print(f"{model_spec.name}: {log['parameters']:,} parameters on {where}, from step {step}")
    console.print(f"corpus {corpus.sha256}: {len(corpus.train):,} bytes to train on, {len(corpus.held_out):,} held out")
    console.print(f"a bigram table gives {log['corpus']['bigram_loss']:.3f} nats per held-out byte")

    def seconds() -> float:
        return seconds_before + time.perf_counter() - started

    def evaluate_and_log() -> float:
        before = seconds()
        loss = evaluate(model, *held_out, batch_size)
        log["held_out"].append({"step": step, "seconds": seconds(), "loss": loss})
        console.print(f"step {step:5d}  {seconds():7.1f} s  held-out loss {loss:.4f}")
        return seconds() - before

    out.mkdir(parents=True, exist_ok=True)
    evaluation = evaluate_and_log() if step == 0 else 0.0
    with progress_bar() as bar:
        task = bar.add_task("training", total=1.0, loss="")
        while settings.done(step, seconds() + evaluation) < 1:
            input_ids, labels = (tensor.to(where) for tensor in corpus.batch(step, batch_size, seq_len, seed))
            for group in optimizer.param_groups:
                group["lr"] = settings.lr_at(step, settings.done(step, seconds()))

            loss = model.loss(input_ids, labels)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            step += 1
            log["train"].append({"step": step, "seconds": seconds(), "loss": loss.item()})
            bar.update(task, completed=settings.done(step, seconds()), loss=f"step {step}  loss {loss.item():.3f}")
            if step % eval_every == 0:
                evaluation = evaluate_and_log()
                write_json(out / "loss.json", log)
            if step % save_every == 0:
                save_checkpoint(out, model, optimizer, step, seconds(), log)

    if log["held_out"][-1]["step"] != step:
        evaluate_and_log()
    write_json(out / "loss.json", log)
    folder = save_checkpoint(out, model, optimizer, step, seconds(), log)
    with progress_bar() as bar:
        task = bar.add_task("evaluating", total=1.0, loss="on all held-out bytes")
        input_ids, labels = (tensor.to(where) for tensor in corpus.all_held_out(seq_len))
        loss = evaluate(model, input_ids, labels, EVALUATED, lambda share: bar.update(task, completed=share))
    log["final"] = {"bytes": labels.numel(), "loss": loss}
    write_json(out / "loss.json", log)
    console.print(f"on all {labels.numel():,} held-out bytes: loss {loss:.4f}")
    console.print(f'the curve: {out / "loss.json"}; the model: attncompiler.load("{folder / "model"}")')


@torch.no_grad()
def evaluate(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    batch_size: int,
    seen: Callable[[float], object] = lambda share: None,
) -> float:
    """Nats per byte over windows (N, T), in batches of `batch_size`; `seen` is told how much is done, up to 1."""
    model.eval()
    total, done = 0.0, 0
    for ids, targets in zip(input_ids.split(batch_size), labels.split(batch_size), strict=True):
        total += model.loss(ids, targets).item() * targets.numel()  # type: ignore[operator]
        done += targets.numel()
        seen(done / labels.numel())
    model.train()
    return total / labels.numel()


def newest_checkpoint(run: Path) -> Path | None:
    """The folder `step-N` with the largest N."""
    folders = [path for path in run.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return max(folders, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def save_checkpoint(
    run: Path, model: Any, optimizer: torch.optim.Optimizer, step: int, seconds: float, log: dict[str, Any]
) -> Path:
    """Write `step-N` beside the one before, which goes when the new one is complete. Returns its folder."""
    folder, unfinished = run / f"step-{step}", run / f"unfinished-{step}"
    if folder.exists():
        return folder
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    attncompiler.save(model, unfinished / "model")
    state = {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    save_file(state, unfinished / "optimizer.safetensors")
    write_json(unfinished / "progress.json", {"step": step, "seconds": seconds, "log": log})
    before = newest_checkpoint(run)
    unfinished.rename(folder)
    if before is not None:
        shutil.rmtree(before)
    return folder


def restore_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, path: Path) -> None:
    """Give each parameter the moments that were saved under its name."""
    parameters = dict(model.named_parameters())
    for key, value in load_file(path).items():
        name, _, entry = key.rpartition("/")
        parameter = parameters[name]
        optimizer.state[parameter][entry] = value if entry == "step" else value.to(parameter.device)


def refuse_differences(same_spec: bool, log: dict[str, Any], settings: Settings, corpus: Corpus) -> None:
    """Stop when a resumed run would not be the same run."""
    differences = [] if same_spec else ["the spec"]
    differences += [f"--{k.replace('_', '-')}" for k, v in asdict(settings).items() if log["settings"][k] != v]
    differences += [] if log["corpus"]["sha256"] == corpus.sha256 else ["the corpus"]
    if differences:
        raise typer.BadParameter(f"the run to resume differs in {', '.join(differences)}")


def write_json(path: Path, data: object) -> None:
    """Write by rename, so that a reader never sees half a file."""
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(data, indent=1))
    unfinished.replace(path)


def progress_bar() -> Progress:
    """A bar on a terminal; silent in a pipe."""
    columns = (
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)


if __name__ == "__main__":
    try:
        typer.run(main)
    except attncompiler.AttnCompilerError as error:
        sys.exit(str(error))
