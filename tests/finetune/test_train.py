"""`patchkit train`: what it writes, that it goes on where it was, and that what it made runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import patchkit
from patchkit import InvalidOption, PatchkitError, zoo
from patchkit.finetune import loop
from patchkit.finetune.rows import Rows, split
from patchkit.recipe_files import files
from patchkit.runs import jobbing

FILE = """\
version: 1
model: zoo/bytes
recipes:
  - moh: {{shared: 0.5, active: 0.75, router: {router}}}
inputs: {{prompt: "The tide", max_new_tokens: 4}}
train: {{text: {text}, steps: 4, batch: 4, window: 32, lr: 1.0e-2, rank: 4, save_every: 2, evaluate_every: 2{more}}}
output: {output}
"""


@pytest.fixture
def request_(tmp_path: Path, monkeypatch: Any) -> Any:
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text(zoo.prose()[:3000], encoding="utf-8")

    def make(output: str = "out", router: str = "linear", more: str = "") -> files.RecipeFile:
        path = tmp_path / f"{output}.yaml"
        path.write_text(FILE.format(router=router, text=text, output=f"{tmp_path / output}/", more=more))
        return files.load(path)

    return make


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def rows(folder: Path) -> list[dict[str, Any]]:
    drop = ("seconds",)
    lines = [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in drop} for line in lines]


def test_it_trains_goes_on_and_runs(request_: Any, tmp_path: Path, monkeypatch: Any) -> None:
    told: list[str] = []
    whole = jobbing.run(request_("whole"), "train", progress=lambda p: told.append(str(p)))
    assert told[-1].startswith("4 of 4: tuned")
    assert "left" in told[0]
    assert whole.data["tuned"]["after"] < whole.data["tuned"]["before"]
    names = {p.name for p in (tmp_path / "whole").iterdir()} - {".running"}
    assert names == {
        "adapter_config.json", "adapter_model.safetensors", "training.jsonl", "training.json", "recipe.yaml",
    }  # fmt: skip

    # stopped after its third step, then again: the same weights and log
    own = loop.Training._step

    def stop(self: Any, model: Any, optimizer: Any, step: int) -> Any:
        if step == 3:
            raise KeyboardInterrupt
        return own(self, model, optimizer, step)

    monkeypatch.setattr(loop.Training, "_step", stop)
    with pytest.raises(KeyboardInterrupt):
        jobbing.run(request_("parts"), "train")
    monkeypatch.setattr(loop.Training, "_step", own)
    with pytest.raises(PatchkitError, match=r"other settings \(seed\)"):
        jobbing.run(request_("parts", more=", seed: 1"), "train")
    jobbing.run(request_("parts"), "train")
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")

    # finished: said, not done again; other settings are refused
    said: list[str] = []
    again = jobbing.run(request_("whole"), "train", say=said.append)
    assert any("finished" in line for line in said)
    assert again.data == whole.data
    with pytest.raises(InvalidOption, match="another training"):
        jobbing.run(request_("whole", more=", seed: 1"), "train")

    # in a script, by peft and by the recipe, and as a recipe file
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        tuned = PeftModel.from_pretrained(zoo.load("bytes").model, tmp_path / "whole")(ids).logits
        model = zoo.load("bytes").model
        plain = model(ids).logits
        with patchkit.apply(model, "moh", adapter=str(tmp_path / "whole")):
            assert torch.equal(model(ids).logits, tuned)
        assert torch.equal(model(ids).logits, plain)
    from patchkit.runs import running

    result = running.run(running.job_of(files.load(tmp_path / "whole" / "recipe.yaml")), bars=False)
    assert set(result.files) >= {"dense", "patched"}


def interrupted(request_: Any, monkeypatch: Any, output: str) -> Any:
    """A file whose training was stopped behind its checkpoint at step 2."""
    file = request_(output)
    with monkeypatch.context() as patched:
        step = loop.Training._step

        def stopped(self: Any, model: Any, optimizer: Any, number: int) -> Any:
            if number == 3:
                raise KeyboardInterrupt
            return step(self, model, optimizer, number)

        patched.setattr(loop.Training, "_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            jobbing.run(file, "train")
    return file


@pytest.mark.parametrize("damage", ["empty", "cut", "other", "no log", "log cut"])
def test_what_is_damaged_is_said(request_: Any, tmp_path: Path, monkeypatch: Any, damage: str) -> None:
    file = interrupted(request_, monkeypatch, "damaged")
    checkpoint, log = tmp_path / "damaged" / "checkpoint.pt", tmp_path / "damaged" / "training.jsonl"
    left = checkpoint.with_name(".checkpoint-1234.pt")
    left.write_bytes(b"half")
    if damage == "empty":
        checkpoint.write_bytes(b"")
    elif damage == "cut":
        checkpoint.write_bytes(checkpoint.read_bytes()[:2000])
    elif damage == "other":
        torch.save({"step": 1}, checkpoint)
    elif damage == "no log":
        log.unlink()
    else:
        log.write_bytes(log.read_bytes()[:40] + b"\xff\xfe")
    with pytest.raises(PatchkitError, match="does not hold" if "log" in damage else "checkpoint is damaged"):
        jobbing.run(file, "train")
    assert not left.exists()


def test_how_the_model_is_loaded_stays(request_: Any, tmp_path: Path) -> None:
    request_("v1.5")
    path = tmp_path / "v1.5.yaml"
    path.write_text(path.read_text().replace("zoo/bytes", "{id: zoo/bytes, dtype: bfloat16}"))
    jobbing.run(files.load(path), "train")
    model = files.load(tmp_path / "v1.5" / "recipe.yaml").model
    assert model is not None
    assert (model.id, model.dtype) == ("zoo/bytes", "bfloat16")
    path.write_text(path.read_text().replace("bfloat16", "float32"))
    with pytest.raises(InvalidOption, match=r"other dtype"):
        jobbing.run(files.load(path), "train")


def test_steps_that_diverge_are_not_taken(request_: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Neither weights nor a checkpoint of a step whose gradients are not finite."""
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args, **kwargs: torch.tensor(float("inf")))
    with pytest.raises(PatchkitError, match="norm of the gradients is inf at step 1"):
        jobbing.run(request_("inf"), "train")
    assert not (tmp_path / "inf" / "checkpoint.pt").exists()


def test_all_weights_and_a_baseline(request_: Any, tmp_path: Path) -> None:
    result = jobbing.run(request_("all", more=", weights: all, baseline: true, accumulate: 2"), "train")
    assert result.data["baseline"]["before"] == pytest.approx(result.data["dense"]["perplexity"], rel=1e-5)
    assert result.data["tuned"]["tokens"] == result.data["baseline"]["tokens"] == 4 * 4 * 32
    recipe = files.load(tmp_path / "all" / "recipe.yaml")
    assert recipe.model is not None
    assert recipe.model.id == str(tmp_path / "all" / "model")
    assert (tmp_path / "all" / "baseline" / "model" / "config.json").is_file()
    assert not list((tmp_path / "all").rglob("checkpoint.pt"))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (("moh: {shared", "adaspa: {}\n#  - moh: {shared"), "brings? an? ?adapter|cannot be tuned"),
        (("text.txt", "nothing.txt"), "cannot read"),
        (("text.txt", "empty.txt"), "no text in it"),
        (("window: 32", "window: 3000"), "tokens"),
        (("steps: 4", "stpes: 4"), "stpes"),
    ],
)
def test_wrong_requests(request_: Any, tmp_path: Path, change: tuple[str, str], what: str) -> None:
    request_("wrong")
    (tmp_path / "empty.txt").write_text(" \n")
    path = tmp_path / "wrong.yaml"
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(PatchkitError, match=what):
        jobbing.run(files.load(path), "train")
    assert not (tmp_path / "wrong" / "adapter_config.json").exists()


def test_rows_depend_on_seed_and_step_alone() -> None:
    tokenizer = zoo.load("bytes").tokenizer
    one = Rows.of("abcdefgh" * 20, tokenizer, 9, 3, "here")
    assert one.tokens.shape == (20, 9)
    assert (one.tokens[:, 0] == tokenizer.bos_token_id).all()
    assert torch.equal(one.of_step(7, 6), Rows.of("abcdefgh" * 20, tokenizer, 9, 3, "here").of_step(7, 6))
    numbered = Rows(torch.arange(5)[:, None], 0)
    turn = torch.cat([numbered.of_step(step, 2) for step in range(5)]).flatten().tolist()
    assert sorted(turn[:5]) == sorted(turn[5:]) == [0, 1, 2, 3, 4]
    learned, held = split("one two.\n\nthree", 0.5)
    assert (learned, held) == ("one two.", "three")
    assert split("whole", 0.0) == ("whole", "")


@pytest.mark.slow
def test_two_processes(request_: Any, tmp_path: Path) -> None:
    """accelerate on two CPU processes (gloo) ends where one ends."""
    alone = jobbing.run(request_("one"), "train")
    request_("two")
    code = "from patchkit.runs import jobbing; from patchkit.recipe_files import files; import sys, torch; "
    code += "torch.set_num_threads(1); jobbing.run(files.load(sys.argv[1]), 'train')"
    workers = []
    for rank in range(2):
        env = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29500 + os.getpid() % 1000), "ACCELERATE_USE_CPU": "true",
        }  # fmt: skip
        command = [sys.executable, "-P", "-c", code, str(tmp_path / "two.yaml")]
        workers.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    for worker in workers:
        output, _ = worker.communicate(timeout=400)
        assert worker.returncode == 0, output[-3000:]
    found = json.loads((tmp_path / "two" / "training.json").read_text())
    assert found["tuned"]["after"] == pytest.approx(alone.data["tuned"]["after"], rel=0.02)
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert first.keys() == second.keys()
