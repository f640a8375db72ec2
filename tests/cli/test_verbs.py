"""Verbs that recipes bring with them: commands, sections of recipe files, schema; and the first of them, headhunt."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest
import testing_jobs
import tiny
import typer
from typer.testing import CliRunner

from patchkit import PatchkitError, RecipeFileError, jobs
from patchkit.cli import verbs
from patchkit.cli.main import _Group, app
from patchkit.recipe_files import files, schema
from patchkit.recipe_files.yamlread import read_text
from patchkit.runs import loading

KNOWN = {
    "calibrate.toy": jobs.Verb("calibrate.toy", "testing_jobs:JOB", "Calibrate a toy."),
    "count": jobs.Verb("count", "testing_jobs:JOB", "Count."),
    "broken": jobs.Verb("broken", "testing_jobs:NO_JOB", "Is no job."),
}


@pytest.fixture
def toys(monkeypatch):
    monkeypatch.setattr(jobs, "verbs", lambda: KNOWN)
    own = typer.Typer(cls=_Group, pretty_exceptions_enable=False)
    own.callback()(lambda: None)
    verbs.add_to(own)
    return lambda *arguments: CliRunner().invoke(own, [str(a) for a in arguments])


def test_verbs_are_commands_with_one_word_or_two(toys, pipe, recipe_file):
    result = toys("count", recipe_file, "--output", "out/n.json", "--set", "count.samples=3")
    assert result.exit_code == 0, result.stderr
    assert Path("out/n.json").read_text() == "3 CogVideoXPipeline dimming"
    assert "all counted" in result.stdout
    assert "note: done already" in result.stderr
    assert "0 of 3: counting, about 2 s left" in result.stderr
    assert [p.name for p in Path("out").iterdir()] == ["n.json"], "no temporary file is left"
    result = toys("calibrate", "toy", recipe_file, "--set", "calibrate.toy.samples=2", "--json", "-o", "n.json")
    assert json.loads(result.stdout) == {"samples": 2, "files": {"count": "n.json"}, "notes": ["done already"]}


def test_sections_are_checked_with_their_lines(toys, pipe, recipe_file):
    text = recipe_file.read_text()
    wrong = {
        "count: {sampels: 3}": ("count has no option 'sampels'", "did you mean 'samples'"),
        "count: {samples: 0}": ("samples: 0 does not fit", "greater than or equal to 1 (how many)"),
        "count: {samples: true}": ("samples: True does not fit", "valid integer"),
        "count: 3": ("count is a number", "write a mapping"),
        "calibrate: {tyo: {}}": ("there is no verb 'calibrate tyo'", "did you mean 'toy'"),
        "calibrate: {toy: {wich: a}}": ("calibrate.toy has no option 'wich'", "did you mean 'wish'"),
        "cuont: {}": ("there is no field 'cuont'", "did you mean 'count'"),
    }
    for section, (what, remedy) in wrong.items():
        recipe_file.write_text(text + section + "\n")
        result = toys("count", recipe_file)
        assert result.exit_code == 2, section
        assert what in result.stderr
        assert "r.yaml:9" in result.stderr
        assert remedy in result.stderr
    recipe_file.write_text(text + "calibrate: {toy: {samples: 7}}\ncount: {wish: impossible}\n")
    result = toys("count", recipe_file)
    assert result.exit_code == 2
    assert "r.yaml:10, field 'count.wish'" in result.stderr
    assert files.load(recipe_file).jobs["calibrate.toy"].samples == 7


def test_exit_codes(toys, pipe, recipe_file):
    assert toys("count", recipe_file, "--set", "count.wish=fail").exit_code == 1
    result = toys("count", recipe_file, "--set", "count.wihs=fail", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["type"] == "RecipeFileError"
    result = toys("broken", recipe_file)
    assert result.exit_code == 1
    assert "is no Job" in result.stderr
    assert toys("count", "nowhere.yaml").exit_code == 2
    with pytest.raises(PatchkitError, match="did you mean 'count'"):
        jobs.get("cuont")


def test_help_lists_verbs_without_importing_them_and_shows_their_options(toys):
    listed = toys("--help").stdout
    assert "Calibrate a toy." in toys("calibrate", "--help").stdout
    assert "Count." in listed
    assert "Is no job." in listed
    shown = toys("count", "--help").stdout
    assert "Count to SAMPLES." in shown
    assert re.search(r"samples +4 +how many", shown)
    assert "--num-frames" in shown


@pytest.mark.parametrize("words", [["train"], ["calibrate", "deltallm"]])
def test_verbs_of_language_models_have_no_flags_for_pictures(cli, words):
    shown = cli(*words, "--help").stdout
    assert "--prompt" in shown
    assert "--num-frames" not in shown


def test_packages_offer_verbs_by_entry_points(monkeypatch):
    class Point:
        dist = None

        def __init__(self, name: str) -> None:
            self.name, self.value = name, "testing_jobs:JOB"

    points = [Point("measure"), Point("headhunt"), Point("not a verb")]
    monkeypatch.setattr(jobs, "entry_points", lambda group: points if group == "patchkit.jobs" else [])
    found = jobs.verbs.__wrapped__()
    assert found["measure"].load() is testing_jobs.JOB
    assert found["headhunt"].value != "testing_jobs:JOB", "a name that is taken stays whose it was"
    assert "not a verb" not in found


def test_the_schema_has_the_sections(toys):
    made = schema.schema()
    base = {"version": 1, "recipes": ["dimming"]}
    jsonschema.validate(base | {"count": {"samples": 2}, "calibrate": {"toy": {"wish": "a"}}}, made)
    for wrong in ({"count": {"sampels": 2}}, {"calibrate": {"toi": {}}}, {"count": {"samples": 0}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(base | wrong, made)


# --- headhunt

HUNT = """\
version: 1
model: {model}
recipes: [softpag: {{strength: 1.0}}]
inputs: {{num_inference_steps: 2, height: 32, width: 48, max_sequence_length: 16}}
headhunt: {{objective: "testing_jobs:size", prompts: [a, b], top_k: 2, rounds: 2, batch: 3, layers: "1-"}}
output: out/heads.json
"""


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "flux"
    tiny.PIPELINES["flux"].build().save_pretrained(folder)
    return folder


@pytest.fixture
def hunting(here, flux_folder, monkeypatch):
    pipe = tiny.PIPELINES["flux"].build()
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr(loading, "load", lambda spec, quiet=False: loading.Loaded(pipe, "pipeline"))
    monkeypatch.setattr(testing_jobs, "calls", 0)
    (here / "h.yaml").write_text(HUNT.format(model=flux_folder))
    return lambda *arguments: CliRunner().invoke(app, ["headhunt", "h.yaml", *arguments])


def test_a_hunt_by_command_stopped_and_gone_on_with(hunting, monkeypatch):
    whole = hunting("--output", "whole.json", "--json")
    assert whole.exit_code == 0, whole.stderr
    found = json.loads(whole.stdout)
    assert len(found["heads"]) == 4
    complete = testing_jobs.calls
    assert complete == (6 + 4) * 2, "two double and two single blocks of two heads, the first block left out"
    monkeypatch.setattr(testing_jobs, "stop_at", complete + 15)
    stopped = hunting()
    assert stopped.exit_code == 130
    assert [p.name for p in Path("out").iterdir()] == ["heads.hunt.json"], "the store, whole; nothing else"
    monkeypatch.setattr(testing_jobs, "stop_at", None)
    before = testing_jobs.calls
    resumed = hunting()
    assert resumed.exit_code == 0, resumed.stderr
    assert testing_jobs.calls - before < complete
    assert json.loads(Path("out/heads.json").read_text())["heads"] == found["heads"]
    assert "L" in resumed.stdout
    again = hunting("--set", "headhunt.rounds=1", "--set", "headhunt.store=out/heads.hunt.json", "--json")
    assert json.loads(again.stdout)["heads"] == found["heads"][:2], "fewer rounds of the same hunt"


def test_what_cannot_be_hunted_is_refused_before_any_picture(hunting):
    wrong = {
        ("--set", "headhunt.objective=shape-wold"): "did you mean 'shape-world'",
        ("--set", "headhunt.prompts=3"): "no fixed set of 3 prompts",
        ("--set", "softpag.heads=[[0, 0]]"): "without heads",
        ("--output", "out/heads.png"): "`output: out/heads.json`",
        ("--set", "headhunt.top_k=0"): "top_k: 0 does not fit",
    }
    for arguments, what in wrong.items():
        result = hunting(*arguments)
        assert result.exit_code == 2, arguments
        assert what in result.stderr
    assert testing_jobs.calls == 0
    assert not Path("out").exists()


def test_the_shipped_hunt_is_a_valid_file():
    file = files.parse(read_text(files.examples()["headhunt"], "headhunt.yaml"))
    assert file.jobs["headhunt"].top_k == 3
    with pytest.raises(RecipeFileError, match="did you mean 'rounds'"):
        files.parse(read_text(files.examples()["headhunt"].replace("rounds:", "ruonds:"), "headhunt.yaml"))
