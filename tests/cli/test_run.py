"""patchkit run, compare and plan on a tiny real pipeline."""

from __future__ import annotations

import json

import pytest

import patchkit


def written(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != "r.yaml")


COMPARED = [
    "out/clip.dense.gif",
    "out/clip.frames.png",
    "out/clip.gif",
    "out/clip.side-by-side.gif",
    "out/metrics.json",
]


def test_run_compares_and_writes_everything(cli, recipe_file, here, pipe):
    result = cli("run", recipe_file)
    assert result.exit_code == 0, result.output
    assert written(here) == COMPARED
    assert "dimming: 2 sites, 4 calls" in result.stdout
    assert "speed-up" in result.stdout
    metrics = json.loads((here / "out/metrics.json").read_text())
    assert (metrics["seed"], metrics["steps"], metrics["prompt"]) == (0, 2, "a cat")
    assert metrics["shape"] == {"results": 1, "frames": 9, "height": 32, "width": 48}
    assert metrics["versions"]["patchkit"] == patchkit.__version__
    assert metrics["warm_up"]["steps"] == 2
    dense, patched = metrics["variants"]["dense"], metrics["variants"]["patched"]
    assert patched["against"] == "dense"
    assert 5 < patched["psnr"] < 90
    assert 0 < patched["ssim"] < 1
    assert patched["density"] == {"nominal": 0.25, "actual": 0.25, "recall": 0.9}
    assert patched["speed_up"] == pytest.approx(dense["seconds"] / patched["seconds"], rel=0.01)
    assert patched["recipes"][0]["options"]["density"] == 0.25
    assert not patchkit.status(pipe)["patched"]


def test_loading_from_the_folder(cli, recipe_file, here):
    result = cli("run", recipe_file, "--no-compare", "--dtype", "float32", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert written(here) == ["out/clip.gif"]


def test_json_is_one_document_and_nothing_else(cli, recipe_file, here, pipe):
    result = cli("run", recipe_file, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert sorted(document["files"].values()) == COMPARED
    assert document["metrics"]["variants"]["patched"]["psnr"] > 0


def test_json_of_an_error(cli, recipe_file, here):
    result = cli("run", recipe_file, "--json", "--set", "dimming.density=2")
    assert result.exit_code == 2
    document = json.loads(result.stdout)
    assert document["exit_code"] == 2
    assert document["error"]["where"] == "--set dimming.density=2, field 'recipes[0].dimming.density'"


def test_an_identity_is_said_to_be_identical(cli, recipe_file, here, pipe):
    result = cli("run", recipe_file, "--json", "--set", "dimming.density=1.0")
    patched = json.loads(result.stdout)["metrics"]["variants"]["patched"]
    assert (patched["identical"], patched["psnr"], patched["ssim"]) == (True, None, 1.0)


def test_overrides(cli, recipe_file, here, pipe):
    flags = "--prompt dog --negative-prompt cat --num-inference-steps 3 --seed 7 --height 48 --width 32 --num-frames 17"
    more = "--guidance-scale 2 --fps 4 --output other/ --no-compare --json --quiet"
    kwargs = ["--pipeline-kwargs", '{"eta": 0.5}', "--set", "dimming.steps=[0, 2]", "--set", "dimming.layers=0"]
    result = cli("run", recipe_file, *flags.split(), *more.split(), *kwargs)
    assert result.exit_code == 0, result.output
    metrics = json.loads(result.stdout)["metrics"]
    assert (metrics["prompt"], metrics["seed"], metrics["steps"]) == ("dog", 7, 3)
    assert metrics["shape"] == {"results": 1, "frames": 17, "height": 48, "width": 32}
    options = metrics["variants"]["patched"]["recipes"][0]["options"]
    assert (options["density"], options["steps"], options["layers"]) == (0.25, [0, 2], 0)
    assert written(here) == ["other/patched.mp4"]
    assert "loading" not in result.stderr


def test_the_same_seed_gives_the_same_file(cli, recipe_file, here, pipe):
    first, second = (cli("run", recipe_file, "--no-compare", "--output", name) for name in ("a.png", "b.png"))
    assert first.exit_code == second.exit_code == 0
    assert (here / "a.png").read_bytes() == (here / "b.png").read_bytes()
    cli("run", recipe_file, "--no-compare", "--output", "c.png", "--seed", "1")
    assert (here / "a.png").read_bytes() != (here / "c.png").read_bytes()


def test_files_that_were_there_are_named(cli, recipe_file, here, pipe):
    (here / "out").mkdir()
    (here / "out/clip.gif").write_text("old")
    result = cli("run", recipe_file, "--no-compare")
    assert result.exit_code == 0, result.output
    assert "replaced what was there before: out/clip.gif" in result.stderr
    assert (here / "out/clip.gif").read_bytes().startswith(b"GIF")


def test_a_json_output_is_the_record(cli, recipe_file, here, pipe):
    result = cli("run", recipe_file, "--no-compare", "--output", "record.json")
    assert result.exit_code == 0, result.output
    assert written(here) == ["record.json"]
    assert json.loads((here / "record.json").read_text())["variants"]["patched"]["seconds"] > 0


def test_compare_two(cli, recipe_file, here, pipe):
    other = here / "other.yaml"
    other.write_text("version: 1\nrecipes: [{dimming: {density: 0.9}}]\n")
    result = cli("compare", "r.yaml", "other.yaml", "--json", "--set", "dimming.layers=0")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    r, o = (document["metrics"]["variants"][name]["recipes"][0]["options"] for name in ("r", "other"))
    assert (r["density"], o["density"], r["layers"], o["layers"]) == (0.25, 0.9, 0, 0)
    assert set(document["files"]) == {"r", "other", "side-by-side", "frames", "metrics"}
    assert document["files"]["r"] == "out/r-vs-other/r.mp4"


def test_compare_with_dense(cli, recipe_file, here, pipe):
    result = cli("compare", "dense", "r.yaml", "--output", "d.gif")
    assert result.exit_code == 0, result.output
    assert written(here) == ["d.dense.gif", "d.frames.png", "d.r.gif", "d.side-by-side.gif", "metrics.json"]


def test_plan_computes_nothing(cli, recipe_file, here, pipe, monkeypatch):
    monkeypatch.setattr(type(pipe), "__call__", lambda *a, **k: pytest.fail("was called"))
    result = cli("plan", recipe_file)
    assert result.exit_code == 0, result.output
    assert "dimming: 2 of 2 sites" in result.stdout
    assert json.loads(cli("plan", recipe_file, "--json").stdout)["order"] == ["dimming"]
    assert written(here) == []


@pytest.mark.parametrize(("error", "code"), [("runtime", 1), ("value", 1), ("interrupt", 130), ("end", 143)])
def test_a_run_that_fails_leaves_nothing(cli, recipe_file, here, pipe, error, code):
    recipe_file.write_text(recipe_file.read_text().replace("dimming: {density: 0.25}", f"failing: {{error: {error}}}"))
    cls = type(pipe)
    result = cli("run", recipe_file)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert ("on purpose" in result.stderr) == (code == 1)
    assert written(here) == []
    assert not (here / "out").exists()
    assert not patchkit.status(pipe)["patched"]
    assert type(pipe) is cls
    assert "_progress_bar_config" not in vars(pipe)


def test_debug_shows_the_trace(cli, recipe_file, here, pipe):
    recipe_file.write_text(recipe_file.read_text().replace("dimming: {density: 0.25}", "failing"))
    assert "Traceback" in cli("run", recipe_file, "--debug").stderr


def test_an_argument_of_a_recipe_reaches_only_the_patched_run(cli, recipe_file, here, pipe):
    text = recipe_file.read_text().replace("dimming: {density: 0.25}", "captioned").replace("seed: 0", "caption: hello")
    recipe_file.write_text(text)
    result = cli("run", recipe_file, "--json")
    assert result.exit_code == 0, result.output
