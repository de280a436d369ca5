"""`deltaserve inspect` says of a file what a server would make of it, and reads little for that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import archs
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner
from variants import VARIANTS, make_base

from deltaserve.adapters.delta_file import write_delta
from deltaserve.adapters.load import load as load_adapter
from deltaserve.adapters.parent import load_on
from deltaserve.kernels.primitives import LowRank, Scale
from deltaserve.server.cli import app
from deltaserve.server.model import load
from deltaserve.server.model import peek as peeking
from deltaserve.server.model.peek import peek

ARCHS = ["llama-tied-biased", "gpt2", "gemma2", "mixtral", "phi3", "deepseek-v3"]
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inspect")
    make_base(root / "base", "llama")
    generator = torch.Generator().manual_seed(0)
    for name in ("lora", "dora", "ia3", "prefix-tuning", "half-fine-tune"):
        VARIANTS[name].make(root / "base", root / name, generator)
    return root


def inspect(*arguments: object) -> tuple[int, dict[str, Any]]:
    done = CliRunner().invoke(app, ["inspect", "--json", *map(str, arguments)])
    return done.exit_code, json.loads(done.stdout)


@pytest.mark.parametrize("name", ARCHS)
def test_the_base_is_seen_as_it_is_served(name: str, tmp_path: Path) -> None:
    archs.build(name).save_pretrained(tmp_path)
    served = load(tmp_path, dtype=torch.float32)
    with peek(tmp_path) as found:
        spec = found.fingerprinted()
        for field in ("modules", "layers", "hidden_size", "vocab_size", "fingerprint", "tied"):
            assert getattr(spec, field) == getattr(served.spec, field), field
        assert dict(spec.tensor_digests) == served.spec.tensor_digests
        for module in spec.modules:
            torch.testing.assert_close(
                spec.weight(module), served.spec.weight(module), rtol=0, atol=0
            )
            if spec.modules[module].has_bias:  # others of its group may have zeros in its place
                assert torch.equal(spec.bias(module), served.spec.bias(module)), module
            assert (found._refusal(module) == "") == (served.packer.refusal(module) == ""), module


def test_only_what_is_needed_is_read(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    tensor = peeking.Checkpoint.tensor

    def spy(self: Any, name: str) -> torch.Tensor:
        read.extend([name] if self.path.name == "base" else [])
        return tensor(self, name)

    monkeypatch.setattr(peeking.Checkpoint, "tensor", spy)
    monkeypatch.setattr(peeking, "load", lambda *_, **__: pytest.fail("the base was loaded"))
    assert inspect(files / "lora", "--base", files / "base")[0] == 0
    assert not read
    assert inspect(files / "dora", "--base", files / "base")[0] == 0
    assert read and not any("embed" in name or "head" in name for name in read)


@pytest.mark.parametrize("name", ["lora", "ia3", "prefix-tuning", "half-fine-tune"])
def test_it_says_what_the_loader_makes(files: Path, name: str) -> None:
    code, report = inspect(files / name, "--base", files / "base")
    made = load_adapter(files / name, load(files / "base", dtype=torch.float32).spec)
    found = report["base"]
    assert code == 0 and report["refusal"] is None
    assert (found["digest"], found["bytes"]) == (made.digest, made.nbytes)
    assert {
        module: [p["primitive"] for p in group] for module, group in found["modules"].items()
    } == {module: [type(p).__name__ for p in group] for module, group in made.modules.items()}
    assert (found["prefix"] is not None) == (name == "prefix-tuning")
    assert sum("strength 1" in limit for limit in found["composition"]) == (name == "prefix-tuning")


def test_on_top_of_parents(files: Path) -> None:
    spec = load(files / "base", dtype=torch.float32).spec
    line = [files / name for name in ("lora", "ia3", "dora")]
    made = load_adapter(line[0], spec)
    for path in line[1:]:
        made = load_on(path, spec, made)
    parents = [a for path in line[:-1] for a in ("--parent", path)]
    code, report = inspect(line[-1], "--base", files / "base", *parents)
    assert code == 0 and report["base"]["digest"] == made.digest
    assert report["base"]["bytes"] == made.nbytes


def test_every_field_has_a_verdict(files: Path) -> None:
    _, report = inspect(files / "lora")
    verdicts = {field["field"]: field["verdict"] for field in report["fields"]}
    assert verdicts.keys() == report["config"].keys()
    assert verdicts["r"] == "honoured" and verdicts["lora_dropout"] == "irrelevant"
    assert verdicts["task_type"] == "allowed" and "base" not in report


def changed(folder: Path, to: Path, **fields: Any) -> Path:
    to.mkdir()
    config = json.loads((folder / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps(config | fields))
    save_file(load_file(folder / "adapter_model.safetensors"), to / "adapter_model.safetensors")
    return to


def test_what_is_refused_is_said_with_the_reason(files: Path, tmp_path: Path) -> None:
    code, report = inspect(changed(files / "lora", tmp_path / "field", new_magic=3))
    assert code == 1 and report["refusal"]["field"] == "new_magic"
    assert [f["field"] for f in report["fields"] if f["verdict"] == "refused"] == ["new_magic"]
    code, report = inspect(changed(files / "lora", tmp_path / "method", peft_type="NEW"))
    assert code == 1 and report["refusal"]["field"] == "peft_type"
    wide = {UP: (LowRank(torch.ones(1, 8), torch.ones(96, 1)),)}
    write_delta(tmp_path / "shape", wide, kind="x")
    assert inspect(tmp_path / "shape")[0] == 0
    code, report = inspect(tmp_path / "shape", "--base", files / "base")
    assert code == 1 and report["refusal"]["field"] == UP
    scaled = {"model.embed_tokens": (Scale(output=torch.ones(64)),)}
    write_delta(tmp_path / "scaled", scaled, kind="x")
    code, report = inspect(tmp_path / "scaled", "--base", files / "base")
    assert code == 1 and "Scale on an embedding" in report["refusal"]["message"]


def test_a_base_it_was_not_made_for(files: Path, tmp_path: Path) -> None:
    group = {UP: (LowRank(torch.ones(1, 64), torch.ones(96, 1)),)}
    write_delta(tmp_path / "x", group, kind="x", base_fingerprint="0" * 32)
    arguments = (tmp_path / "x", "--base", files / "base")
    code, report = inspect(*arguments)
    assert code == 1 and report["refusal"]["error"] == "BaseMismatch"
    code, report = inspect(*arguments, "--allow-base-mismatch")
    assert code == 0 and report["base"]["match"] == "mismatch" and report["base"]["notes"]


def test_people_are_told_the_same(files: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    shown = run(app, ["inspect", str(files / "ia3"), "--base", str(files / "base")])
    assert shown.exit_code == 0
    for text in ("peft-ia3", "base_model.model.model.layers.1.mlp.down_proj.ia3_l", "as lowered"):
        assert text in shown.stdout
    refused = run(app, ["inspect", str(changed(files / "lora", tmp_path / "x", new_magic=3))])
    assert refused.exit_code == 1 and "refused" in refused.stdout
    assert run(app, ["inspect", str(files / "nowhere")]).exit_code == 2
    wrong = run(app, ["inspect", str(files / "lora"), "--base", str(tmp_path)])
    assert wrong.exit_code == 2 and "--base" in wrong.stderr
