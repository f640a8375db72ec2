"""A tiny real pipeline for commands to run on, and a way to call them."""

from __future__ import annotations

import pytest
import testing_recipes  # noqa: F401  registers its recipes
import tiny
from typer.testing import CliRunner

from patchkit.cli.main import app
from patchkit.runs import loading

RECIPE_FILE = """\
version: 1
model: {model}
recipes:
  - dimming: {{density: 0.25}}
inputs:
  {{prompt: "a cat", num_inference_steps: 2, seed: 0, height: 32, width: 48, num_frames: 9, max_sequence_length: 16}}
output: out/clip.gif
compare: dense
"""


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "cogvideox"
    tiny.PIPELINES["cogvideox"].build().save_pretrained(folder)
    return folder


@pytest.fixture
def pipe(model_folder, monkeypatch):
    """What every load gives during a test."""
    from diffusers import CogVideoXPipeline

    pipe = CogVideoXPipeline.from_pretrained(model_folder)
    monkeypatch.setattr(loading, "load", lambda spec, quiet=False: loading.Loaded(pipe, "pipeline"))
    return pipe


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def recipe_file(here, model_folder):
    path = here / "r.yaml"
    path.write_text(RECIPE_FILE.format(model=model_folder))
    return path


@pytest.fixture
def cli():
    runner = CliRunner()

    def call(*arguments):
        return runner.invoke(app, [str(a) for a in arguments])

    return call
