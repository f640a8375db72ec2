"""The packaged vision-language model: what it is, that it looks, and that recipes and recipe files work on it."""

import json
import subprocess
import sys

import pytest
import testing_recipes  # noqa: F401  registers its recipes
import torch
from PIL import Image

import patchkit
from patchkit import zoo
from patchkit.recipe_files import files, yamlread
from patchkit.runs import running
from patchkit.zoo.training import vlm_evaluate
from patchkit.zoo.training.vlm_model import build_model


@pytest.fixture(scope="module")
def pair():
    return zoo.load("vlm")


@pytest.fixture(scope="module")
def asked():
    """Questions about six pictures whose pairs of shape and colour, or whose scenes, the training never saw."""
    found = []
    for group in ("new_items_alone", "new_items_in_pairs", "new_scenes"):
        found += vlm_evaluate.samples_of(vlm_evaluate.draw_pictures(2, 11, group)[1], 11)
    return found


def test_it_is_the_real_model(pair):
    from transformers import CLIPVisionModel, LlamaModel, LlavaForConditionalGeneration, LlavaProcessor

    model, processor = pair
    assert type(model) is LlavaForConditionalGeneration
    assert type(model.model.vision_tower) is CLIPVisionModel
    assert type(model.model.language_model) is LlamaModel
    assert type(processor) is LlavaProcessor
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.to_dict()["text_config"] == build_model().config.to_dict()["text_config"] | {
        "dtype": model.config.to_dict()["text_config"].get("dtype")
    }


def test_files_are_small_and_complete():
    files_ = {f.name: f.stat().st_size for f in zoo.path("vlm").iterdir()}
    assert sum(files_.values()) < 5_000_000
    assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "example.png"} <= set(files_)


def test_dtype_and_device_can_be_chosen():
    half = zoo.load("zoo/vlm", torch_dtype=torch.bfloat16, device="cpu")
    assert half.model.dtype == torch.bfloat16
    assert half.ask("how many shapes are there?", torch.zeros(3, 64, 64)) in ("none", "one", "two")


def test_it_loads_without_a_network():
    code = (
        "import socket\n"
        "def refuse(*args): raise OSError('no network')\n"
        "socket.socket.connect = refuse\n"
        "from PIL import Image\n"
        "from patchkit import zoo\n"
        "call = zoo.defaults('vlm')\n"
        "print(zoo.load('vlm').ask(call['prompt'], Image.open(call['image'])))\n"
    )
    out = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "a green circle left of an orange square on a black background"


def test_it_answers_and_it_looks(pair, asked):
    samples = [s for about in asked for s in about]
    rights = [s.question.right(a) for s, a in zip(samples, vlm_evaluate.answer(pair, samples), strict=True)]
    assert len(rights) >= 40
    assert sum(rights) >= 0.8 * len(rights)
    elsewhere, _ = vlm_evaluate.judge(pair, vlm_evaluate.swapped(asked))
    untrained, _ = vlm_evaluate.judge(pair._replace(model=build_model().eval()), asked[:2])
    assert elsewhere["all"]["share"] < 0.6
    assert untrained["all"]["share"] < 0.1


def test_a_padded_batch_answers_as_each_does_alone(pair, asked):
    samples = [about[n % len(about)] for n, about in enumerate(asked)]
    together = pair.answers([s.question.text for s in samples], [s.pictures for s in samples])
    assert together == [pair.ask(s.question.text, *s.pictures) for s in samples]
    assert len({len(pair.prompt(s.question.text).split()) for s in samples}) > 1


def test_a_second_turn_sees_the_first_and_the_cache(pair):
    model, processor = pair
    picture = Image.open(zoo.defaults("vlm")["image"])
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "how many shapes are there?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
        {"role": "user", "content": [{"type": "text", "text": "what colour is the background?"}]},
    ]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    given = processor(text=text, images=picture, return_tensors="pt")
    told = [
        processor.decode(
            model.generate(**given, max_new_tokens=4, do_sample=False, use_cache=cache)[0, given.input_ids.shape[1] :],
            skip_special_tokens=True,
        )
        for cache in (True, False)
    ]
    assert told == ["black", "black"]


def test_recipes_go_onto_the_model_and_leave_no_trace(pair):
    call = zoo.defaults("vlm")
    picture = Image.open(call["image"])
    before = pair.ask(call["prompt"], picture)
    with patchkit.apply(pair.model, "dimming", density=0.2, targets=r".*language_model.*") as patch:
        changed = pair.ask(call["prompt"], picture)
    (row,) = patch.report().to_dict()["recipes"]
    assert row["sites"] == 6
    assert row["counts"]["dimmed"] == row["calls"] > 0
    assert changed != before
    assert pair.ask(call["prompt"], picture) == before


@pytest.mark.parametrize("suffix", ["txt", "json"])
def test_a_recipe_file_asks_it(tmp_path, monkeypatch, suffix):
    monkeypatch.chdir(tmp_path)
    Image.open(zoo.defaults("vlm")["image"]).save("a.png")
    text = f"""version: 1
model: zoo/vlm
recipes: [{{dimming: {{density: 1}}}}]
inputs: {{image: a.png, prompt: "what colour is the circle?"}}
output: answer.{suffix}
compare: dense
"""
    result = running.run(running.job_of(files.parse(yamlread.read_text(text, "r.yaml"))), bars=False)
    assert result.metrics["variants"]["patched"]["same_text"] == 1
    if suffix == "txt":
        assert (tmp_path / "answer.txt").read_text() == (tmp_path / "answer.dense.txt").read_text() == "green\n"
    else:
        assert json.loads((tmp_path / "answer.json").read_text())["texts"] == {"dense": ["green"], "patched": ["green"]}


def test_without_a_picture_the_example_is_shown(tmp_path):
    text = f"version: 1\nmodel: zoo/vlm\nrecipes: [dimming]\ninputs: {{prompt: hello}}\noutput: {tmp_path}/a.txt\n"
    file = files.parse(yamlread.read_text(text, "r.yaml"))
    from patchkit.runs import loading

    inputs = running.complete_inputs(running.job_of(file), loading.load(file.model, quiet=True))
    assert inputs["image"].size == (64, 64)
    assert inputs["prompt"] == "hello"
