"""What is saved is what is loaded: function, weights, ties, spec and plans."""

from __future__ import annotations

import ast
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from artifact_models import SPEC, build
from safetensors import safe_open
from safetensors.torch import load_file

import attncompiler
from attncompiler import artifact, pipeline, targets
from attncompiler import spec as specs
from attncompiler.artifact import weights
from attncompiler.emit import CompiledModel

ROOT = Path(__file__).parents[2]
SPECS = [path for path in sorted((ROOT / "specs").glob("*.yaml")) if path.stem != "hybrid_13b"]


def logits(model: CompiledModel) -> torch.Tensor:
    spec = model.spec.model
    torch.manual_seed(0)
    if spec.input == "embeds":
        inputs = torch.randn(2, 37, spec.hidden_size, dtype=next(model.parameters()).dtype)
    else:
        inputs = torch.randint(spec.vocab_size, (2, 37))
    with torch.no_grad():
        return model(inputs)


def train(model: CompiledModel) -> CompiledModel:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    return model


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_every_spec_gives_the_same_logits_bit_for_bit(path: Path, tmp_path: Path) -> None:
    model = train(attncompiler.build(path, device="cpu"))
    loaded = attncompiler.load(attncompiler.save(model, tmp_path / "model"), device="cpu")
    assert torch.equal(logits(model), logits(loaded))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_dtype_of_a_build_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    model = train(build(dtype=dtype))
    loaded = attncompiler.load(attncompiler.save(model, tmp_path / "model"), device="cpu")
    assert next(loaded.parameters()).dtype == dtype
    assert torch.equal(logits(model), logits(loaded))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["mamba_tiny", "mamba2_tiny"])
def test_a_model_that_was_moved_to_a_dtype_comes_back_as_it_was(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Also what the layers keep in fp32 or better by themselves, which `.to` moves too."""
    model = train(attncompiler.build(ROOT / "specs" / f"{name}.yaml", device="cpu")).to(dtype)
    loaded = attncompiler.load(attncompiler.save(model, tmp_path / "model"), device="cpu")
    assert torch.equal(logits(model), logits(loaded))


def test_weights_convert_to_the_dtype_asked_for(model: CompiledModel, saved: Path) -> None:
    loaded = attncompiler.load(saved, device="cpu", dtype=torch.bfloat16)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.to(torch.bfloat16)), name


def test_ties_are_stored_once_and_are_ties_again(saved: Path) -> None:
    stored = set(load_file(saved / "model.safetensors"))
    assert "embed_tokens.weight" in stored
    assert "lm_head.weight" not in stored
    assert not [name for name in stored if name.startswith("layers.1.")]
    loaded = attncompiler.load(saved, device="cpu")
    assert loaded.lm_head.weight is loaded.embed_tokens.weight
    assert loaded.layers["1"].mixer.q_proj.weight is loaded.layers["0"].mixer.q_proj.weight


@pytest.mark.parametrize("limit", [1, 4000, 10**9])
def test_sharded_weights_fill_a_model_as_one_file_does(model: CompiledModel, tmp_path: Path, limit: int) -> None:
    train(model)
    files = weights.store(model, tmp_path, limit)
    held = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            held |= dict.fromkeys(opened.keys(), file.name)
            sizes = [opened.get_tensor(key).nbytes for key in opened.keys()]  # noqa: SIM118 (not a mapping)
        assert sum(sizes) <= limit or len(sizes) == 1
    if len(files) > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == held
        assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    else:
        assert [file.name for file in files] == ["model.safetensors"]
    other = build()
    weights.fill(other, files)
    assert torch.equal(logits(model), logits(other))


def test_a_sharded_artifact_loads(model: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights.store, "__defaults__", (4000,))
    path = attncompiler.save(train(model), tmp_path / "small")
    assert not (path / "model.safetensors").exists()
    assert torch.equal(logits(model), logits(attncompiler.load(path, device="cpu")))
    attncompiler.save(build(), path)
    assert len(artifact.read(path).manifest.weight_files) > 1
    monkeypatch.undo()
    attncompiler.save(build(), path)
    assert {file.name for file in path.glob("model*")} == {"model.safetensors", "modeling.py"}


def test_an_artifact_of_meta_has_no_weights_and_draws_the_same(model: CompiledModel, tmp_path: Path) -> None:
    path = attncompiler.save(build(device="meta"), tmp_path / "small")
    assert not list(path.glob("*.safetensors*"))
    assert artifact.read(path).manifest.weights == "none"
    assert torch.equal(logits(model), logits(attncompiler.load(path, device="cpu")))


def test_weights_without_storage_or_of_views_are_told_apart(model: CompiledModel, tmp_path: Path) -> None:
    """Parameters that share storage without being one are stored apart; half a model on meta is refused."""
    whole = torch.zeros(2, 16, 16)
    near = model.layers["2"].mixer
    near.q_proj.weight, near.o_proj.weight = torch.nn.Parameter(whole[0]), torch.nn.Parameter(whole[1])
    loaded = attncompiler.load(attncompiler.save(model, tmp_path / "views"), device="cpu")
    assert torch.equal(logits(model), logits(loaded))
    model.norm.to("meta")
    with pytest.raises(attncompiler.AttnCompilerError, match=r"E306 .*no storage.*norm\.weight"):
        attncompiler.save(model, tmp_path / "half")
    assert not (tmp_path / "half").exists()


def test_weights_sharded_over_processes_are_refused(model: CompiledModel, tmp_path: Path) -> None:
    """A part of a weight must not pass for the whole; DTensors are known by the method that gathers them."""
    model.norm.weight.full_tensor = lambda: None
    with pytest.raises(attncompiler.AttnCompilerError, match=r"E306 .*sharded.*norm\.weight"):
        attncompiler.save(model, tmp_path / "part")


def test_only_an_emitted_model_is_saved(tmp_path: Path) -> None:
    with pytest.raises(attncompiler.AttnCompilerError, match="E403"):
        attncompiler.save(torch.nn.Linear(2, 2), tmp_path / "other")


def test_spec_and_plans_come_back_equal(model: CompiledModel, saved: Path) -> None:
    stored = artifact.read(saved)
    assert stored.spec == model.spec
    assert stored.plan == model.plan
    assert stored.plans == pipeline.plan(model.spec)
    assert list(stored.plans) == ["h200", "cpu"]
    assert stored.manifest.weights == "initial"
    assert stored.manifest.seed == 3


def test_saving_twice_writes_the_same_bytes(model: CompiledModel, tmp_path: Path) -> None:
    first, second = (attncompiler.save(model, tmp_path / name) for name in ("a", "b"))
    names = {file.name for file in first.iterdir()}
    assert names == {file.name for file in second.iterdir()}
    assert not [name for name in names if (first / name).read_bytes() != (second / name).read_bytes()]


def test_locked_loads_where_the_plan_is_the_same_and_nowhere_else(saved: Path, tmp_path: Path) -> None:
    attncompiler.load(saved, device="cpu", locked=True)
    other = attncompiler.save(build(device="meta", target="h200"), tmp_path / "h200")
    with pytest.raises(attncompiler.AttnCompilerError, match="E305"):
        attncompiler.load(other, device="cpu", locked=True)
    attncompiler.load(other, device="cpu")


def test_the_source_reads_like_a_model(saved: Path) -> None:
    tree = ast.parse((saved / "modeling.py").read_text())
    methods = {c.name: [f.name for f in c.body] for c in tree.body if isinstance(c, ast.ClassDef)}
    assert set(methods["Model"]) == {"forward", "loss", "step"}
    assert sorted(methods) == ["Layer0", "Layer1", "Model"]
    text = (saved / "modeling.py").read_text()
    assert "# layers 0-1" in text
    assert "self.mixer.q_proj(" in text
    assert "= None\n" not in text


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def test_the_report_says_what_runs_and_holds_no_script(tmp_path: Path) -> None:
    target = targets.get("h200").model_dump(mode="json") | {"name": "mine", "title": "<script>alert(1)</script>"}
    text = SPEC.replace("[h200, cpu]", f"[h200, {json.dumps(target)}]")
    path = attncompiler.save(build(text=text), tmp_path / "small")
    page = _Page()
    page.feed((path / "report.html").read_text())
    assert "script" not in page.tags
    assert "<script>alert(1)</script>" in page.text
    for words in (
        "chunkwise",
        "h200",
        "is not built in this version",
        f"{sum(p.numel() for p in build().parameters()):,}",
    ):
        assert words in page.text


def test_the_resolved_spec_is_a_spec(saved: Path) -> None:
    assert specs.read(saved / "spec.resolved.yaml") == specs.parse(SPEC)
