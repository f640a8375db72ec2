"""A comparison measures what it says; stopped and gone on with, it gives the same; nothing is computed twice."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

import patchkit
from patchkit import metrics
from patchkit.evaluation import keys, measures, suite
from patchkit.evaluation.store import Store
from patchkit.media import as_tensor
from patchkit.runs import running


def rows_of(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def lasting(row):
    """A row without what differs from run to run."""
    return {k: v for k, v in row.items() if k not in ("costs", "date")}


def pixels(folder, row):
    with np.load(folder / "frames" / row["file"]) as archive:
        return archive["pixels"]


def test_every_variant_sees_every_prompt_and_seed(finished):
    bench, found = finished
    rows = rows_of(bench.folder / "out")
    places = [(r["variant"], r["case"], r["seed"]) for r in rows]
    seeds = ((0, 0), (0, 1), (1, 1000), (1, 1001))
    assert sorted(places) == sorted((v, *s) for v in ("dense", "strong", "<b>weak</b>") for s in seeds)
    assert [p[0] for p in places[:6]] == ["dense", "strong", "<b>weak</b>", "dense", "<b>weak</b>", "strong"]
    assert not patchkit.status(bench.pipe)["patched"]
    assert sorted(p.name for p in found.files.values()) == ["report.html", "samples.jsonl", "summary.json", "table.md"]


def test_figures_are_those_of_the_stored_pixels(finished):
    bench, found = finished
    folder = bench.folder / "out"
    rows = rows_of(folder)
    dense = {
        (r["case"], r["seed"]): as_tensor(pixels(folder, r).transpose(0, 2, 3, 1)) for r in rows if not r["recipes"]
    }
    wanted = []
    for row in rows:
        if row["variant"] == "strong":
            own = as_tensor(pixels(folder, row).transpose(0, 2, 3, 1))
            wanted.append(metrics.psnr(dense[row["case"], row["seed"]], own))
            assert row["values"]["psnr"] == pytest.approx(wanted[-1])
            assert row["density"]["actual"] == 0.5
        assert (row["costs"]["evaluations"], row["costs"]["evaluated_samples"]) == (1, 2)
        assert row["costs"]["seconds"] > 0
    figure = found.summary["variants"]["strong"]["figures"]["psnr"]
    assert figure["value"] == pytest.approx(sum(wanted) / 4)
    assert (figure["n"], figure["low"] < figure["value"] < figure["high"]) == (4, True)
    assert "psnr" not in found.summary["variants"]["dense"]["figures"]


def test_a_sample_is_what_a_run_gives(finished):
    """The row's prompt and seed are enough to see the sample again."""
    bench, _ = finished
    request = bench.request()
    row = rows_of(bench.folder / "out")[1]
    variant = next(v for v in request.variants if v.label == row["variant"])
    loaded = running.loading.Loaded(bench.pipe, "pipeline")
    with running.patched(loaded, variant):
        inputs = {**request.job.file.inputs, "prompt": row["prompt"], "seed": row["seed"]}
        made = running.calls.call(loaded, inputs, label="x", bars=False)
    assert np.array_equal(measures.result_of("image", made.items[0]).pixels.numpy(), pixels(bench.folder / "out", row))


def test_stopped_and_gone_on_with(finished, tmp_path, monkeypatch):
    bench, _ = finished
    original = bench.folder / "out"
    whole = {r["key"]: r for r in rows_of(original)}
    monkeypatch.setattr(bench, "folder", tmp_path)
    monkeypatch.setattr(bench, "stop_after", 5)
    said: list[str] = []
    bench.calls.clear()
    with pytest.raises(KeyboardInterrupt):
        suite.run(bench.request(), say=said.append)
    assert said[-1] == f"5 of 12 samples are kept in {tmp_path / 'out'}; the same command goes on"
    assert not patchkit.status(bench.pipe)["patched"]
    assert not bench.pipe.unet._forward_pre_hooks
    assert len(rows_of(tmp_path / "out")) == 5
    assert not (tmp_path / "out" / "report.html").exists()
    with (tmp_path / "out" / "samples.jsonl").open("a") as stream:
        stream.write('{"format": 1, "key": "cut o')
    first = list(bench.calls)
    monkeypatch.setattr(bench, "stop_after", None)
    found = bench.run()
    assert len(bench.calls) == 7
    assert not set(first) & set(bench.calls)
    assert found.notes[0].startswith("5 of 12 samples were finished before")
    rows = rows_of(tmp_path / "out")
    assert {r["key"]: lasting(r) for r in rows} == {key: lasting(r) for key, r in whole.items()}
    for row in rows:
        assert np.array_equal(pixels(tmp_path / "out", row), pixels(original, row))
    bench.run()
    assert bench.calls == []


def test_only_what_has_changed_is_computed_again(finished, tmp_path, monkeypatch):
    bench, _ = finished
    shutil.copytree(bench.folder / "out", tmp_path / "out")
    monkeypatch.setattr(bench, "folder", tmp_path)
    found = bench.run(densities=(0.4, 0.9))  # an option of one recipe
    assert {c.split()[0] for c in bench.calls} == {"strong"}
    assert len(bench.calls) == 4
    assert any("4 samples of before were of other options" in note for note in found.notes)
    assert len(rows_of(tmp_path / "out")) == len(list((tmp_path / "out" / "frames").iterdir())) == 12
    monkeypatch.setattr(keys, "recipe_code", lambda recipe: "new")  # the code of the recipes
    bench.run(densities=(0.4, 0.9), seeds=1)
    assert len(bench.calls) == 4
    with_weights = bench.pipe.unet.conv_in.weight.data
    saved = with_weights.clone()
    try:
        with_weights.mul_(1.01)  # the model
        bench.run(densities=(0.4, 0.9), seeds=1)
        assert len(bench.calls) == 6
    finally:
        with_weights.copy_(saved)


def test_finished_samples_are_measured_again_without_a_call(finished, tmp_path, monkeypatch):
    bench, _ = finished
    shutil.copytree(bench.folder / "out", tmp_path / "out")
    monkeypatch.setattr(bench, "folder", tmp_path)
    monkeypatch.setattr(keys, "measuring_code", lambda: "new")
    real = measures.figures
    monkeypatch.setattr(measures, "figures", lambda *a: (f := real(*a)) | {"values": f["values"] | {"flicker": 3.0}})
    found = bench.run()
    assert bench.calls == []
    assert len(rows_of(tmp_path / "out")) == 12
    assert found.summary["variants"]["dense"]["figures"]["flicker"]["value"] == 3


def test_a_sample_whose_file_is_gone_is_computed_again(finished, tmp_path, monkeypatch):
    bench, _ = finished
    shutil.copytree(bench.folder / "out", tmp_path / "out")
    monkeypatch.setattr(bench, "folder", tmp_path)
    row = rows_of(tmp_path / "out")[0]
    (tmp_path / "out" / "frames" / row["file"]).unlink()
    bench.run()
    assert bench.calls == ["dense a cat 0"]
    assert len(rows_of(tmp_path / "out")) == 12


def test_a_disk_that_is_full(finished, tmp_path, monkeypatch):
    bench, _ = finished
    monkeypatch.setattr(bench, "folder", tmp_path)

    def full(self, path, result):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Store, "_save", full)
    with pytest.raises(patchkit.PatchkitError, match="No space left") as caught:
        bench.run(seeds=1)
    assert "goes on from there" in caught.value.remedy


def test_the_same_recipe_twice_and_how_far_it_is(finished, tmp_path, monkeypatch):
    bench, _ = finished
    monkeypatch.setattr(bench, "folder", tmp_path)
    told = []
    request = bench.request(densities=(1.0, 1.0), labels=("same", "same"), seeds=1)
    found = suite.run(request, say=lambda text: None, progress=told.append)
    assert list(found.summary["variants"]) == ["dense", "same", "same-2"]
    for label in ("same", "same-2"):
        figures = found.summary["variants"][label]["figures"]
        assert figures["identical"]["value"] == figures["ssim"]["value"] == 1
        assert "psnr" not in figures
    assert [(p.done, p.total) for p in told] == [(i, 6) for i in range(6)]
    assert str(told[0]) == "sample 1 of 6: dense, 'a cat', seed 0"
    assert told[0].left is None
    assert 0 < told[-1].left < told[1].left
    assert str(told[-1]).endswith("left")
