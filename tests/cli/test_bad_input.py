"""Whatever is wrong with a request: exit code 2, a readable block with place and remedy, nothing loaded or written."""

from __future__ import annotations

import os

import pytest
from recipe_files import test_files

from patchkit.runs import loading


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch):
    monkeypatch.setattr(loading, "load", lambda *a, **k: pytest.fail("a model was loaded"))


def refused(result, here, *words):
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    for word in (*words, "  where: ", "  do:    "):
        assert word in result.stderr
    assert [p.name for p in here.iterdir() if p.name not in ("r.yaml", "folder", "file")] == []


@pytest.mark.parametrize("name", test_files.BAD)
def test_contents(name, cli, here):
    text, _, field, what, remedy = test_files.BAD[name]
    (here / "r.yaml").write_text(text)
    refused(cli("run", "r.yaml"), here, "r.yaml:", what, remedy, f"'{field}'" if field else "")


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize("name", test_files.BYTES)
def test_bytes(name, command, cli, here):
    content, what = test_files.BYTES[name]
    (here / "r.yaml").write_bytes(content)
    refused(cli(command, "r.yaml"), here, "r.yaml", what)


@pytest.mark.parametrize("name", test_files.MISSING)
def test_what_a_run_needs(name, cli, here):
    text, field, remedy = test_files.MISSING[name]
    (here / "r.yaml").write_text(test_files.HEAD + text)
    refused(cli("run", "r.yaml"), here, "r.yaml:", field, remedy)


def test_paths(cli, here):
    (here / "folder").mkdir()
    refused(cli("run", "folder"), here, "folder is a directory")
    refused(cli("run", "none.yaml"), here, "there is no file none.yaml")
    refused(cli("run", "adapsa"), here, "did you mean 'adaspa'?")
    refused(cli("run", "slow"), here, "no model is named", "--model")


RUNNABLE = """\
version: 1
model: zoo/video
recipes: [dimming]
inputs: {prompt: a cat, seed: 0}
output: clip.gif
"""

FLAGS = {
    "set without dot": (["--set", "density=1"], "recipe.option=value"),
    "set without value": (["--set", "dimming.density"], "recipe.option=value"),
    "set of another recipe": (["--set", "dimmin.density=1"], "'dimming'"),
    "set of an unknown option": (["--set", "dimming.densty=1"], "'density'"),
    "set out of range": (["--set", "dimming.density=2"], "less than or equal to 1"),
    "steps": (["--num-inference-steps", "0"], "--num-inference-steps, field 'inputs.num_inference_steps'"),
    "seed": (["--seed", "-1"], "--seed, field 'inputs.seed'"),
    "prompt": (["--prompt", ""], "--prompt"),
    "model": (["--model", "zoo/vidoe"], "--model, field 'model'"),
    "dtype": (["--dtype", "int8"], "--dtype, field 'model.dtype'"),
    "device": (["--device", "gpu"], "--device, field 'model.device'"),
    "absent device": (["--device", "cuda:99"], "this machine has"),
    "offload": (["--offload", "all"], "--offload, field 'model.offload'"),
    "offload on the cpu": (["--offload", "sequential", "--device", "cpu"], "accelerator"),
    "output suffix": (["--output", "a.avi"], "--output, field 'output'"),
    "output of another kind": (["--output", "a.txt"], "cannot be written as .txt"),
    "output below a file": (["--output", "r.yaml/a.gif"], "is a file, not a folder"),
    "kwargs no JSON": (["--pipeline-kwargs", "{eta"], "not JSON"),
    "kwargs a list": (["--pipeline-kwargs", "[1]"], "not a JSON object"),
}


@pytest.mark.parametrize("name", FLAGS)
def test_flags(name, cli, here, monkeypatch, model_folder):
    monkeypatch.setattr("patchkit.zoo.path", lambda name: model_folder)
    (here / "r.yaml").write_text(RUNNABLE)
    flags, words = FLAGS[name]
    refused(cli("run", "r.yaml", *flags), here, words)


def test_inputs_are_checked_against_the_pipeline(cli, here, model_folder):
    text = RUNNABLE.replace("zoo/video", str(model_folder)).replace("seed: 0", "num_frame: 9")
    (here / "r.yaml").write_text(text)
    refused(cli("run", "r.yaml"), here, "r.yaml:4", "takes no input 'num_frame'", "'num_frames'")


def test_inputs_that_are_files_must_exist(cli, here, model_folder):
    (here / "r.yaml").write_text(RUNNABLE.replace("seed: 0", "image: none.png"))
    refused(cli("run", "r.yaml"), here, "there is no file none.png", "r.yaml:4")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root writes everywhere")
def test_unwritable_folder(cli, here):
    (here / "folder").mkdir(mode=0o500)
    (here / "r.yaml").write_text(RUNNABLE)
    refused(cli("run", "r.yaml", "--output", "folder/a.gif"), here, "cannot write into")


def test_a_folder_nobody_can_write_to(cli, here):
    (here / "r.yaml").write_text(RUNNABLE)
    refused(cli("run", "r.yaml", "--output", "/proc/none/a.gif"), here, "cannot write into /proc", "choose a folder")


def test_a_folder_in_the_way_of_the_metrics(cli, here):
    (here / "folder" / "metrics.json").mkdir(parents=True)
    (here / "r.yaml").write_text(RUNNABLE)
    refused(cli("run", "r.yaml", "--output", "folder/a.gif"), here, "metrics.json is a folder")


def test_mp4_without_its_writer(cli, here, monkeypatch, model_folder):
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda n, *a: None if n.startswith("imageio") else find(n, *a))
    (here / "r.yaml").write_text(RUNNABLE.replace("zoo/video", str(model_folder)))
    refused(cli("run", "r.yaml", "--output", "a.mp4"), here, "patchkit[video]")


USAGE = {
    "unknown flag": (["run", "adaspa", "--promt", "x"], "--prompt"),
    "unknown command": (["rnu"], "run"),
    "no file": (["run"], "FILE|NAME"),
    "seed no number": (["run", "adaspa", "--seed", "x"], "--seed"),
    "one of two": (["compare", "adaspa"], "B"),
    "value missing": (["run", "adaspa", "--model"], "--model"),
}


@pytest.mark.parametrize("name", USAGE)
def test_usage(name, cli, here):
    arguments, words = USAGE[name]
    refused(cli(*arguments), here, words, "--help")


def test_comparisons(cli, here):
    (here / "r.yaml").write_text(RUNNABLE)
    refused(cli("compare", "dense", "dense"), here, "dense against dense")
    refused(cli("compare", "r.yaml", "dense", "--set", "slow.seconds=1"), here, "no recipe 'slow' takes part")
    assert cli("compare", "r.yaml", "none").exit_code == 2


def test_recipes_that_do_not_exist(cli, here):
    result = cli("info", "adapsa")
    assert result.exit_code == 2
    assert "did you mean 'adaspa'?" in result.stderr
