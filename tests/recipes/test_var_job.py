"""`patchkit calibrate var`: from a recipe file and pictures to channels that the recipe finds by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny.vlms import VLMS
from transformers import BatchFeature
from typer.testing import CliRunner
from var_oracle import Sinks, attentive

import patchkit
from patchkit import registry
from patchkit.cli.main import app
from patchkit.recipe_files import files
from patchkit.recipe_files.yamlread import read_text
from patchkit.recipes.var import channels
from patchkit.runs import loading

FILE = """\
version: 1
model: {model}
recipes: [var: {{tau: 4.0}}]
calibrate: {{var: {{images: pictures, questions: ["what is this?", "where is it?"]}}}}
"""


class Processor:
    """Sixteen image tokens a picture, one token a letter."""

    image_token = "<image>"

    def __init__(self) -> None:
        self.prompts: list[str] = []

    def apply_chat_template(self, messages: Any, add_generation_prompt: bool) -> str:
        return "".join("#" if part["type"] == "image" else part["text"] for part in messages[0]["content"])

    def __call__(self, text: str, images: Any, return_tensors: str) -> BatchFeature:
        self.prompts.append(text)
        ids = [1]
        for letter in text:
            ids += [390] * 16 if letter == "#" else [3 + ord(letter) % 300]
        found: dict[str, Any] = {"input_ids": torch.tensor([ids])}
        if images:
            generator = torch.Generator().manual_seed(images[0].getpixel((0, 0))[0])
            found["pixel_values"] = torch.randn(1, 3, 32, 32, generator=generator)
        return BatchFeature(found)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATCHKIT_DATA", str(tmp_path / "data"))
    model = attentive(5)
    model.save_pretrained(tmp_path / "model")
    loaded = loading.Loaded(model, "chat", processor=Processor())
    monkeypatch.setattr(loading, "load", lambda spec, quiet=False: loaded)
    (tmp_path / "c.yaml").write_text(FILE.format(model=tmp_path / "model"))
    (tmp_path / "pictures").mkdir()
    for n in range(8):
        Image.new("RGB", (8, 8), (n, n, n)).save(tmp_path / "pictures" / f"{n}.png")
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    return lambda *arguments: (CliRunner().invoke(app, ["calibrate", "var", "c.yaml", *arguments]), loaded)


def test_what_is_found_is_filed_and_used(run: Any) -> None:
    result, loaded = run("--output", "out/var.yaml", "--json", "--quiet")
    assert result.exit_code != 0, "nothing is planted, so nothing is found"
    with Sinks(loaded.target):
        result, _ = run("--output", "out/var.yaml", "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["sink_dims"] == [5]
    assert told["files"] == {"registry": str(channels.user_file()), "recipe": "out/var.yaml"}
    assert (told["evidence"]["prompts"], told["evidence"]["with_images"]) == (16, 8)
    assert told["evidence"]["visual_sinks"] == 2.0
    assert not patchkit.status(loaded.target)["patched"]
    with patchkit.apply(loaded.target, "var", tau=4.0) as patch:
        assert patch.recipes[0].options() == {"tau": 4.0}
    with patchkit.apply(loaded.target, "out/var.yaml") as patch:
        assert patch.recipes[0].options()["sink_dims"] == [5]


def test_questions_are_asked_about_pictures_and_texts_without(run: Any) -> None:
    _, loaded = run()
    asked = loaded.processor.prompts
    assert asked[:3] == ["#what is this?", "#where is it?", "#what is this?"]
    assert len(asked) == 16
    assert not any("#" in text for text in asked[8:])


def test_a_refusal_says_why_and_writes_nothing(run: Any) -> None:
    result, _ = run("--output", "out/var.yaml")
    assert result.exit_code != 0
    assert "no channel of the first token reaches 4" in result.stderr
    assert "largest |x| / RMS" in result.stderr, "what was seen is told"
    assert not Path("out").exists()
    assert not channels.user_file().exists()


def test_wrong_requests(run: Any) -> None:
    Path("broken.png").write_text("nothing")
    for arguments, what in (
        (("--output", "found.txt"), "recipe file"),
        (("--set", "calibrate.var.images=nowhere"), "there is no folder nowhere"),
        (("--set", "calibrate.var.images=[a.png]"), "there is no file a.png"),
        (("--set", "calibrate.var.images=[broken.png]"), "1 pictures tell too little"),
        (("--set", f"calibrate.var.images=[{','.join(['broken.png'] * 8)}]"), "cannot read broken.png"),
        (("--set", "calibrate.var.imags=a"), "did you mean 'images'"),
        (("--set", "calibrate.var.max_images=2"), "max_images"),
        (("--set", "var.sink_dims=[3]"), "given already"),
    ):
        result, _ = run(*arguments)
        assert result.exit_code == 2, (arguments, result.stdout, result.stderr)
        assert what in result.stderr, (arguments, result.stderr)
    assert not channels.user_file().exists()


def test_wrong_files_are_refused_before_the_model_is_loaded(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load", lambda *a, **k: pytest.fail("loaded"))
    result, _ = run("--set", "calibrate.var.images=nowhere")
    assert (result.exit_code, "there is no folder nowhere" in result.stderr) == (2, True)


def test_models_that_read_no_pictures(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = loading.Loaded(VLMS["llava"].build(), "text", tokenizer=object())
    monkeypatch.setattr(loading, "load", lambda spec, quiet=False: text)
    result, _ = run()
    assert result.exit_code == 2
    assert "does not read pictures" in result.stderr


def test_the_shipped_files_are_valid() -> None:
    registry.all_recipes()
    for name in ("var", "var-calibrate"):
        file = files.parse(read_text(files.examples()[name], f"{name}.yaml"))
        assert [r.name for r in file.recipes] == ["var"]
