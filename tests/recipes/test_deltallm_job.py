"""`patchkit calibrate deltallm`: from a recipe file to one with thresholds that reach their target."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from typer.testing import CliRunner

import patchkit
from patchkit import registry
from patchkit.cli.main import app
from patchkit.recipe_files import files
from patchkit.recipe_files.yamlread import read_text
from patchkit.runs import loading

FILE = """\
version: 1
model: {model}
recipes: [deltallm: {{chunk: 16, window: 20, min_tokens: 0, sink: 2, theta: 0.1}}]
calibrate: {{deltallm: {{target_sparsity: 0.4, texts: ["keys of neighbouring tokens are alike, and so on and on"]}}}}
output: out/found.yaml
"""


class Tokenizer:
    def __call__(self, text: str, return_tensors: str) -> Any:
        generator = torch.Generator().manual_seed(len(text))
        return type("Encoding", (), {"input_ids": torch.randint(3, 380, (1, 3 * len(text)), generator=generator)})


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    model = tiny.MODELS["llama"].build()
    model.save_pretrained(tmp_path / "model")
    loaded = loading.Loaded(model, "text", Tokenizer())
    monkeypatch.setattr(loading, "load", lambda spec, quiet=False: loaded)
    (tmp_path / "c.yaml").write_text(FILE.format(model=tmp_path / "model"))
    return lambda *arguments: (CliRunner().invoke(app, ["calibrate", "deltallm", "c.yaml", *arguments]), model)


def test_a_calibrated_file_is_applied_and_reaches_its_target(run: Any) -> None:
    result, model = run("--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["files"] == {"recipe": "out/found.yaml"}
    assert not patchkit.status(model)["patched"]
    with patchkit.apply(model, "out/found.yaml") as patch, torch.no_grad():
        assert patch.recipes[0].options()["theta"] == found["options"]["theta"]
        assert patch.recipes[0].options()["chunk"] == 16
        model(Tokenizer()("k" * 50, "pt").input_ids, use_cache=False)
        assert patch.report()["recipes"][0]["means"]["removed"] == pytest.approx(0.4, abs=0.1)


def test_what_cannot_be_calibrated_is_refused(run: Any) -> None:
    for arguments, what in (
        (("--output", "found.txt"), "recipe file"),
        (("--set", "calibrate.deltallm.target_sparsity=1.5"), "target_sparsity"),
        (("--set", "calibrate.deltallm.file=nowhere.txt"), "both texts and file"),
        (("--set", "calibrate.deltallm.target_sparsity=0.99"), "out of reach"),
        (("--set", "calibrate.deltallm.texs=a"), "did you mean 'texts'"),
    ):
        result, _ = run(*arguments)
        assert result.exit_code == 2, (arguments, result.stdout, result.stderr)
        assert what in result.stderr
    assert not Path("out").exists()


def test_the_shipped_files_are_valid() -> None:
    registry.all_recipes()
    for name in ("deltallm", "deltallm-calibrate"):
        file = files.parse(read_text(files.examples()[name], f"{name}.yaml"))
        assert [r.name for r in file.recipes] == ["deltallm"]
