"""patchkit compare over prompts and seeds, on the zoo's video model; and requests that are wrong."""

from __future__ import annotations

import json

import pytest

from patchkit.locking import LOCK, alone_in
from patchkit.runs import loading
from patchkit.zoo import worlds

FILE = """\
version: 1
model: zoo/video
recipes: [{{dimming: {{density: {}}}}}]
inputs: {{num_inference_steps: 2}}
"""


@pytest.fixture
def sources(here):
    for name, density in (("weak", 0.9), ("none", 0.05)):
        (here / f"{name}.yaml").write_text(FILE.format(density))
    return ["weak.yaml", "none.yaml"]


def test_from_end_to_end(cli, here, sources):
    arguments = ("compare", "none.yaml", "dense", "--prompts", 2, "--device", "cpu")
    result = cli(*arguments)
    assert result.exit_code == 0, result.output
    folder = here / "out" / "compare-none"
    names = {p.name for p in folder.iterdir()}
    assert names == {"report.html", "samples.jsonl", "summary.json", "table.md", "frames", LOCK}
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [r["prompt"] for r in rows[::2]] == list(worlds.of("video").prompts(2))
    assert {(r["variant"], r["seed"]) for r in rows} == {(v, s) for v in ("dense", "none") for s in (0, 1000)}
    for row in rows:
        assert set(row["verdict"]["right"]) == {"background", "colour", "shape", "motion"}
        assert {"smoothness", "flicker"} <= set(row["values"])
        assert (row["costs"]["evaluations"], row["costs"]["evaluated_samples"]) == (2, 4)
    page = (folder / "report.html").read_text()
    assert page.count("<figure") == 4
    assert "only where something is wrong" in page
    assert page.count("✓") + page.count("✗") == 4 * 4
    assert len(page) < 1_000_000
    for words in ("zoo/video on cpu", "2 prompts x 1 seeds", "speed-up", "report.html"):
        assert words in result.stdout
    again = cli(*arguments, "--json")
    assert again.exit_code == 0, again.output
    document = json.loads(again.stdout)
    assert document["notes"][0].startswith("4 of 4 samples were finished before")
    none = document["summary"]["variants"]["none"]["figures"]
    assert none["psnr"]["value"] < 20
    assert none["right"]["value"] == 0
    assert none["right_shape"]["against_dense"]["n"] == 2


def test_the_standard_suite_is_the_same_code(here, sources, monkeypatch, capsys):
    import importlib
    import sys
    from pathlib import Path

    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    script = importlib.import_module("shapeworld")
    told: list = []
    common = ["--output", "o", "--threads", "1"]
    monkeypatch.setattr(script, "run", lambda request, **options: told.append(request))
    monkeypatch.setattr(script, "keep", lambda found: None)
    monkeypatch.setattr(script, "show", lambda found, kept: None)
    monkeypatch.setattr(sys, "argv", ["shapeworld.py", "weak.yaml", "none.yaml", *common])
    assert script.main() == 0
    (request,) = told
    assert [v.label for v in request.variants] == ["dense", "weak", "none"]
    assert (len(request.cases), request.seeds) == (script.PROMPTS, script.SEEDS)
    assert request.job.file.inputs["num_inference_steps"] == 20  # whatever the files say: it is a standard
    monkeypatch.setattr(sys, "argv", ["shapeworld.py", "weak.yaml", "--model", "zoo/nothing", *common])
    assert script.main() == 2
    assert "no model 'nothing'" in capsys.readouterr().err


BAD = {
    "an unknown recipe": (["weak.yaml", "none.yaml", "adapsa"], "did you mean 'adaspa'?"),
    "an empty file of prompts": (["weak.yaml", "dense", "--prompts", "empty.txt"], "holds no prompt"),
    "no such file": (["weak.yaml", "dense", "--prompts", "mine.txt"], "there is no file mine.txt"),
    "no prompts at all": (["weak.yaml", "dense", "--prompts", "0"], "0 prompts were asked for"),
    "no seeds": (["weak.yaml", "dense", "--seeds", "0"], "0 seeds were asked for"),
    "nothing but dense": (["dense", "dense", "--prompts", "2"], "dense against dense"),
    "a folder of others": (["weak.yaml", "dense", "--seeds", "2", "-o", "folder"], "holds no comparison"),
    "rows of others": (["weak.yaml", "dense", "--seeds", "2", "-o", "rows"], "holds no comparison"),
    "a file for many results": (["weak.yaml", "dense", "--seeds", "2", "-o", "a.mp4"], "end the output with /"),
    "a file in the way": (["weak.yaml", "dense", "--seeds", "2", "-o", "file/"], "is a file, not a folder"),
    "another recipe's option": (["weak.yaml", "dense", "--seeds", "2", "--set", "slow.seconds=1"], "no recipe 'slow'"),
    "a missing input": (["weak.yaml", "dense", "--prompts", "edits.jsonl"], "there is no file none.png"),
    "a device": (["weak.yaml", "dense", "--seeds", "2", "--device", "cuda:99"], "this machine has"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said_before_anything_is_loaded(name, cli, here, sources, monkeypatch):
    monkeypatch.setattr(loading, "load", lambda *a, **k: pytest.fail("a model was loaded"))
    (here / "empty.txt").write_text("# nothing\n")
    (here / "edits.jsonl").write_text('{"prompt": "a", "inputs": {"image": "none.png"}}')
    (here / "folder").mkdir()
    (here / "folder" / "mine").write_text("")
    (here / "file").write_text("")
    (here / "rows").mkdir()
    (here / "rows" / "samples.jsonl").write_text('{"mine": 1}\n')
    before = sorted(here.rglob("*"))
    arguments, words = BAD[name]
    result = cli("compare", *arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    for part in (words, "error: ", "  where: ", "  do:    "):
        assert part in result.stderr
    assert sorted(here.rglob("*")) == before


def test_a_model_without_a_world(cli, here, sources, model_folder, monkeypatch):
    monkeypatch.setattr(loading, "load", lambda *a, **k: pytest.fail("a model was loaded"))
    result = cli("compare", "weak.yaml", "dense", "--prompts", 3, "--model", model_folder)
    assert result.exit_code == 2
    assert "has no world of its own" in result.stderr
    result = cli("compare", "weak.yaml", "dense", "--seeds", 3, "--model", model_folder)
    assert "the prompt is missing" in result.stderr


def test_two_runs_do_not_write_to_one_folder(cli, here, pipe, model_folder):
    (here / "plain.yaml").write_text(f"version: 1\nmodel: {model_folder}\nrecipes: [{{dimming: {{density: 0.5}}}}]\n")
    flags = ["--prompt", "cat", "--seeds", 1, "--pipeline-kwargs", "{}", "--output", "held"]
    with alone_in(here / "held", "a comparison"):
        result = cli("compare", "plain.yaml", "dense", *flags)
    assert result.exit_code == 1, result.output
    assert "a comparison is already running in this folder" in result.stderr
    assert {p.name for p in (here / "held").iterdir()} == {LOCK}


@pytest.mark.parametrize(("error", "code"), [("runtime", 1), ("interrupt", 130)])
def test_what_is_finished_stays(cli, here, pipe, model_folder, error, code):
    (here / "bad.yaml").write_text(f"version: 1\nmodel: {model_folder}\nrecipes: [{{failing: {{error: {error}}}}}]\n")
    size = {"height": 32, "width": 48, "num_frames": 9, "max_sequence_length": 16, "num_inference_steps": 1}
    flags = ["--prompt", "cat", "--seeds", 2, "--pipeline-kwargs", json.dumps(size)]
    result = cli("compare", "bad.yaml", "dense", *flags)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert not (here / "out" / "compare-bad" / "report.html").exists()
