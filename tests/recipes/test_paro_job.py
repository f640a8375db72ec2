"""`patchkit calibrate paro FILE`: section, plan where the recipe wants it, going on."""

from __future__ import annotations

import json

import pytest
import tiny
import torch

import patchkit
from patchkit.errors import InvalidOption
from patchkit.jobs import JobCall, get
from patchkit.recipe_files import files
from patchkit.recipes.paro import Paro, PermutePlan

FILE = """
version: 1
model: zoo/video
recipes:
  - paro: {plan: %s}
inputs: {prompt: "a red circle", num_inference_steps: 2}
calibrate: {paro: {density: 0.5, block_size: 16, buckets: 2, order_steps: 1}}
output: out/x.mp4
"""
INPUTS = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 2, "prompt": "a red circle", "seed": 3}


def call_of(tmp_path, pipe, plan="plan.safetensors", recipes=None, inputs=None, told=None, **options):
    job = get("calibrate.paro").load()
    plan = str(tmp_path / plan)
    sizes = {"density": 0.5, "block_size": 16, "buckets": 2, "order_steps": 1}
    entry = tiny.PIPELINES["cogvideox"]
    extra = {n: v for n, v in entry.call.items() if n not in ("prompt", "output_type", "num_frames")}
    call = JobCall(
        target=pipe,
        tokenizer=None,
        model="x",
        recipes=(Paro(plan=plan),) if recipes is None else recipes,
        inputs={**extra, **(INPUTS if inputs is None else inputs)},
        options=job.options(**sizes, **options),
        output=None,
        device="cpu",
        say=lambda text: None,
        progress=lambda p: None if told is None else told.append(p),
    )
    return job, call


@pytest.fixture
def pipe():
    pipe = tiny.PIPELINES["cogvideox"].build()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_writes_the_plan_and_cleans_up(tmp_path, pipe):
    told = []
    job, call = call_of(tmp_path, pipe, told=told)
    kept = tmp_path / "plan.calibration" / "notes.txt"
    kept.parent.mkdir()
    kept.write_text("somebody's")
    result = job.run(call)
    path = tmp_path / "plan.safetensors"
    assert result.files == {"plan": path}
    assert [p.name for p in kept.parent.iterdir()] == ["notes.txt"], "only what it wrote is removed"
    kept.unlink()
    kept.parent.rmdir()
    assert [p.name for p in tmp_path.iterdir()] == ["plan.safetensors"]
    plan = PermutePlan.load(path)
    assert plan.facts.steps == 2
    assert plan.facts.options["seed"] == 3
    assert [(p.done, p.total) for p in told] == [(1, 2), (2, 2)]
    assert "kept mass" in result.text
    assert any("serves 2 steps" in note for note in result.notes)
    json.dumps(result.to_dict())
    with patchkit.apply(pipe, "paro", plan=str(path)) as patch:
        call = dict(call.inputs) | {"output_type": "latent", "generator": torch.Generator().manual_seed(0)}
        call.pop("seed")
        pipe(**call)
        assert patch.report()["recipes"][0]["counts"]["sparse"] > 0


def test_goes_on_where_it_was(tmp_path, pipe, monkeypatch):
    told = []
    job, call = call_of(tmp_path, pipe, prompts=["a red circle", "a cat"], told=told)
    run = type(pipe).__call__
    calls = []

    def stopping(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(self, *args, **kwargs)

    monkeypatch.setattr(type(pipe), "__call__", stopping)
    with pytest.raises(KeyboardInterrupt):
        job.run(call)
    assert (tmp_path / "plan.calibration").is_dir()
    assert not (tmp_path / "plan.safetensors").exists()
    job.run(call)
    assert len(calls) == 5  # two runs for the orders were kept
    assert (tmp_path / "plan.safetensors").is_file()


def test_says_what_is_missing(tmp_path, pipe):
    job, call = call_of(tmp_path, pipe, recipes=())
    with pytest.raises(InvalidOption, match="where its plan goes"):
        job.run(call)
    with pytest.raises(InvalidOption, match="where its plan goes"):
        job.check(call)
    job, call = call_of(tmp_path, pipe, inputs={n: v for n, v in INPUTS.items() if n != "prompt"})
    with pytest.raises(InvalidOption, match="no prompt"):
        job.run(call)
    with pytest.raises(InvalidOption, match="no prompt"):
        job.check(call)
    job, call = call_of(tmp_path, None, inputs={}, prompts=["a red circle"])
    job.check(call)


def test_the_section_is_part_of_recipe_files(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(FILE % (tmp_path / "plan.safetensors"))
    file = files.parse(files.read_file(path))
    assert file.jobs["calibrate.paro"].density == 0.5
    path.write_text((FILE % "p").replace("density: 0.5", "densiti: 0.5"))
    with pytest.raises(patchkit.RecipeFileError, match="densiti"):
        files.parse(files.read_file(path))
    for name in ("paro", "int8"):
        assert [r.name for r in files.parse(files.locate(name)).recipes] == [name]


def test_nothing_is_left_beside_the_plan(tmp_path, pipe):
    job, call = call_of(tmp_path, pipe)
    job.run(call)
    assert [p.name for p in tmp_path.iterdir()] == ["plan.safetensors"]
