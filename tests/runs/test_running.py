"""Runs from Python: what is checked first, what is called, what is measured and what is written."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import testing_recipes  # noqa: F401  registers its recipes
import tiny
import torch
from PIL import Image

import patchkit
from patchkit import errors
from patchkit.recipe_files import files, yamlread
from patchkit.recipe_files.fields import ModelSpec, Output
from patchkit.runs import calls, loading, measure, outputs, running, writing
from patchkit.runs.loading import Loaded
from patchkit.runs.outputs import Names


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "sd15"
    tiny.PIPELINES["sd15"].build().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    from tiny import tokenizers

    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny.MODELS["llama"].build().save_pretrained(folder)
    tokenizers.llama().save_pretrained(folder)
    return folder


def file_of(model, more="", recipes="[dimming]", inputs="prompt: a cat, num_inference_steps: 2, height: 32, width: 32"):
    text = f"version: 1\nmodel: {model}\nrecipes: {recipes}\ninputs: {{{inputs}}}\n{more}\n"
    return files.parse(yamlread.read_text(text, "r.yaml"))


def run(file):
    said = []
    result = running.run(running.job_of(file), say=said.append, bars=False)
    return result, said


def written(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_a_picture(picture_folder, here):
    result, said = run(file_of(picture_folder, "output: a.png\ncompare: dense"))
    assert written(here) == ["a.dense.png", "a.png", "a.side-by-side.png", "metrics.json"]
    assert said == [
        f"loading {picture_folder}",
        "warming up (2 steps each)",
        "running dense",
        "running patched (dimming)",
    ]
    patched = result.metrics["variants"]["patched"]
    assert patched["psnr"] > 0
    assert result.metrics["pipeline"] == "StableDiffusionPipeline"
    assert Image.open("a.png").size[0] >= 32
    assert json.loads((here / "metrics.json").read_text()) == json.loads(writing.to_json(result.metrics))


def test_the_metrics_of_another_run_are_not_replaced_in_silence(picture_folder, here):
    for name, told in (("a.png", False), ("a.png", False), ("b.png", True), ("b.png", False)):
        result, _ = run(file_of(picture_folder, f"output: {name}\ncompare: dense"))
        assert any("told of a.png; a folder for each" in note for note in result.notes) == told
        assert set(json.loads((here / "metrics.json").read_text())["files"].values()) >= {name, "metrics.json"}


def test_several_pictures_are_numbered(picture_folder, here):
    inputs = "prompt: [a cat, a dog], num_inference_steps: 1, height: 32, width: 32"
    run(file_of(picture_folder, "output: a.png", inputs=inputs))
    run(file_of(picture_folder, "output: b/", inputs=inputs))
    assert written(here) == ["a-0.png", "a-1.png", "b/patched-0.png", "b/patched-1.png"]


def test_the_run_is_what_apply_and_the_pipeline_give(picture_folder, here):
    file = file_of(picture_folder, "output: a.png")
    run(file)
    pipe = loading.load(file.model, quiet=True).target
    with patchkit.apply(pipe, "dimming"):
        image = pipe(
            "a cat", num_inference_steps=2, height=32, width=32, generator=torch.Generator().manual_seed(0)
        ).images[0]
    shown = Image.open("a.png").resize(image.size, Image.NEAREST)  # tiny pictures are written enlarged
    assert shown.tobytes() == image.tobytes()


def test_what_recipes_draw_is_written_where_there_are_several_files(text_folder, here):
    inputs, draws = "prompt: hello, max_new_tokens: 2", "[dimming: {density: 0.5, label: draws}]"
    run(file_of(text_folder, "output: a.txt", recipes=draws, inputs=inputs))
    assert written(here) == ["a.txt"]
    run(file_of(text_folder, "output: a.txt\ncompare: dense", recipes=draws, inputs=inputs))
    name = "patched.dimming-what-is-left.png"
    assert written(here) == ["a.dense.txt", f"a.{name}", "a.txt", "metrics.json"]
    assert Image.open(f"a.{name}").getpixel((0, 0)) == (128, 128, 128)
    result, _ = run(file_of(text_folder, "output: b/", recipes=draws, inputs=inputs))
    assert written(here / "b") == [name, "patched.txt"]
    assert result.files["patched.dimming-what-is-left"] == Path("b") / name


def test_a_text_model(text_folder, here):
    inputs = "prompt: hello, max_new_tokens: 5"
    result, _ = run(file_of(text_folder, "output: a.txt\ncompare: dense", inputs=inputs))
    assert written(here) == ["a.dense.txt", "a.txt", "metrics.json"]
    assert result.metrics["variants"]["patched"]["of"] == 1
    assert result.metrics["pipeline"] == "LlamaForCausalLM"
    run(file_of(text_folder, "output: b.json", inputs=inputs))
    record = json.loads((here / "b.json").read_text())
    assert record["texts"]["patched"] == [(here / "a.txt").read_text().removesuffix("\n")]


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory):
    from patchkit.zoo.chat import chat_processor
    from patchkit.zoo.training.vlm_model import build_model

    folder = tmp_path_factory.mktemp("models") / "llava"
    build_model().save_pretrained(folder)
    chat_processor().save_pretrained(folder)
    return folder


def test_a_model_that_reads_pictures(chat_folder, here):
    """The runner asks as the model's own processor and ``generate`` do, about one picture, two, or none."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    for name in ("red", "blue"):
        Image.new("RGB", (64, 64), name).save(f"{name}.png")
    model = LlavaForConditionalGeneration.from_pretrained(chat_folder).eval()
    processor = AutoProcessor.from_pretrained(chat_folder)
    for given, names in (("image: red.png, ", ["red"]), ("image: [red.png, blue.png], ", ["red", "blue"]), ("", [])):
        inputs = f"{given}prompt: ['what is this?', 'how many?'], max_new_tokens: 4"
        result, _ = run(file_of(chat_folder, "output: a.json", inputs=inputs, recipes="[{dimming: {density: 1}}]"))
        assert result.metrics["pipeline"] == "LlavaForConditionalGeneration"
        told = json.loads((here / "a.json").read_text())["texts"]["patched"]
        for question, answer in zip(("what is this?", "how many?"), told, strict=True):
            content = [*({"type": "image"} for _ in names), {"type": "text", "text": question}]
            text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            pictures = [Image.open(f"{name}.png") for name in names]
            encoded = processor(text=text, images=pictures or None, return_tensors="pt")
            with torch.no_grad():
                tokens = model.generate(**encoded, max_new_tokens=4, do_sample=False)
            assert answer == processor.decode(tokens[0, encoded.input_ids.shape[1] :], skip_special_tokens=True)


def test_a_prompt_that_places_its_pictures_is_taken_as_it_is(chat_folder, here):
    Image.new("RGB", (64, 64)).save("a.png")
    loaded = loading.load(ModelSpec(str(chat_folder)), quiet=True)
    assert loaded.kind == "chat"
    seen = []
    loaded.target.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"]), with_kwargs=True)
    inputs = {"prompt": "what <image> is this", "image": Image.open("a.png"), "max_new_tokens": 1}
    calls.call(loaded, inputs, label="x", bars=False)
    words = loaded.processor.tokenizer.convert_ids_to_tokens(seen[0][0])
    assert words == ["<s>", "what", *["<image>"] * 64, "is", "this"]


def test_each_picture_of_a_list_must_be_there(chat_folder, here):
    Image.new("RGB", (64, 64)).save("a.png")
    file = file_of(chat_folder, "output: a.txt", inputs="prompt: hello, image: [a.png, b.png]")
    with pytest.raises(errors.InvalidOption, match=r"there is no file b\.png"):
        run(file)
    with pytest.raises(errors.InvalidOption, match="offload is for diffusers"):
        loading.load(ModelSpec(str(chat_folder), offload="model"))


@pytest.mark.parametrize(
    ("more", "what"),
    [("output: a.png", "cannot be written as .png"), ("output: a.mp4", "cannot be written as .mp4")],
)
def test_text_is_no_picture(text_folder, here, more, what):
    with pytest.raises(errors.InvalidOption, match=what):
        run(file_of(text_folder, more, inputs="prompt: hello"))
    assert written(here) == []


def test_a_picture_is_no_video(picture_folder, here):
    with pytest.raises(errors.InvalidOption, match=r"cannot be written as \.gif") as caught:
        run(file_of(picture_folder, "output: a.gif"))
    assert caught.value.where == "r.yaml:5, field 'output'"


def test_what_matches_nothing_is_known_before_any_compute(picture_folder, here, monkeypatch):
    monkeypatch.setattr(calls, "call", lambda *a, **k: pytest.fail("was called"))
    with pytest.raises((errors.NothingMatched, errors.InvalidOption)):
        run(file_of(picture_folder, "output: a.png", recipes="[{dimming: {targets: [nowhere]}}]"))
    assert written(here) == []


def test_a_refusal_of_the_pipeline_is_readable(picture_folder, here):
    with pytest.raises(errors.PatchkitError, match="divisible by 8") as caught:
        run(file_of(picture_folder, "output: a.png", inputs="prompt: a cat, height: 33, width: 32"))
    assert "StableDiffusionPipeline" in caught.value.where
    assert written(here) == []


def test_inputs_that_are_pictures(here):
    Image.new("RGB", (8, 8), "red").save("a.png")
    loaded = calls.load_media({"image": "a.png", "prompt": "a.png", "mine": "a.png", "n": 3}, {"mine"})
    assert loaded["image"].size == loaded["mine"].size == (8, 8)
    assert (loaded["prompt"], loaded["n"]) == ("a.png", 3)
    (here / "b.png").write_text("no picture")
    with pytest.raises(errors.InvalidOption, match=r"cannot read b\.png"):
        calls.load_media({"image": "b.png"}, set())


def test_comparison_takes_the_first_file_and_says_so():
    first = file_of("a/b", "output: a.png")
    second = file_of("c/d", "output: b.png", inputs="prompt: a dog")
    job = running.comparison(first, second, ("x", "x"))
    assert [v.label for v in job.variants] == ["x-a", "x-b"]
    assert job.file is first
    assert len(job.notes) == 2
    assert running.comparison(None, second, ("dense", "y")).file is second


def test_inputs_of_other_recipes_are_left_out():
    file = file_of("a/b", "compare: dense", recipes="[captioned]", inputs="prompt: a, caption: b")
    job = running.job_of(file)
    dense, patched = (job.inputs_for(v, file.inputs) for v in job.variants)
    assert (set(dense), set(patched)) == ({"prompt"}, {"prompt", "caption"})


NAMES = {
    "file": (Output(Path("o/c.mp4"), folder=False), "c.mp4", "c.dense.mp4", "c-1.mp4"),
    "folder": (Output(Path("o"), folder=True), "patched.mp4", "dense.mp4", "patched-1.mp4"),
}


@pytest.mark.parametrize("name", NAMES)
def test_names(name):
    output, primary, other, numbered = NAMES[name]
    names = Names(output)
    assert str(names.folder) == "o"
    assert names.suffix("video") == ".mp4"
    assert names.of("patched", ".mp4", primary=True) == primary
    assert names.of("dense", ".mp4") == other
    assert names.of("patched", ".mp4", primary=True, number=1) == numbered


def test_staging_shows_files_only_at_the_end(here):
    with outputs.staging(here / "x" / "y") as stage:
        stage.path("a.txt").write_text("new")
        stage.path("b.txt").write_text("new")
        (here / "x/y/a.txt").write_text("old")
        assert (here / "x/y/a.txt").read_text() == "old"
        stage.commit()
    assert written(here) == ["x/y/a.txt", "x/y/b.txt"]
    assert (here / "x/y/a.txt").read_text() == "new"
    assert stage.replaced == [here / "x/y/a.txt"]


def test_staging_that_fails_leaves_nothing(here):
    def fail():
        with outputs.staging(here / "x" / "y") as stage:
            stage.path("a.txt").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(here.iterdir()) == []


def test_staging_keeps_what_was_there(here):
    (here / "x").mkdir()
    (here / "x/old").write_text("")
    with pytest.raises(RuntimeError), outputs.staging(here / "x"):
        raise RuntimeError
    assert written(here) == ["x/old"]


def test_json_is_strict():
    text = writing.to_json({"a": math.inf, "b": [math.nan, 1.5], "c": torch.float16, 1: (2,)})
    assert json.loads(text) == {"a": None, "b": [None, 1.5], "c": "torch.float16", "1": [2]}


def test_distances_of_results_that_differ_in_shape():
    a, b = (calls.Produced("image", [torch.rand(3, n, 16)]) for n in (16, 24))
    assert measure.distances(a, b)["psnr"] is None
    assert "not compared" in measure.distances(a, b)["note"]


def test_tiny_pictures_have_no_ssim():
    a, b = (calls.Produced("image", [torch.rand(3, 8, 8)]) for _ in range(2))
    assert measure.distances(a, b)["ssim"] is None
    assert measure.distances(a, b)["psnr"] > 0


@pytest.mark.parametrize(
    ("result", "kind", "count"),
    [
        (([Image.new("RGB", (8, 8))] * 3,), "video", 1),
        (([[Image.new("RGB", (8, 8))] * 3] * 2,), "video", 2),
        ((torch.rand(2, 5, 3, 8, 8),), "video", 2),
        ((torch.rand(2, 3, 8, 8),), "image", 2),
    ],
)
def test_results_are_taken_apart(result, kind, count):
    found, items = calls.unpack(result, kind)
    assert (found, len(items)) == (kind, count)


def test_density_of_several_recipes():
    row = {"means": {"density": 0.2, "actual_density": 0.3, "recall": 0.9}, "options": {"density": 0.2}}
    one = {"recipe": "a", **row}
    assert measure.densities({"recipes": [one]}) == {"nominal": 0.2, "actual": 0.3, "recall": 0.9}
    both = measure.densities({"recipes": [one, {"recipe": "b", **row}, {"recipe": "c"}]})
    assert set(both) == {"a", "b"}


def test_detectors_only_where_they_mean_something():
    clip = calls.Produced("video", [torch.zeros(5, 3, 64, 64)])
    caption = "a red circle moving right on a blue background"
    assert set(measure.detect(clip, True, caption)) >= {"colour", "shape", "all"}
    assert measure.detect(clip, True, "a cat") is None
    assert measure.detect(clip, False, caption) is None


def test_devices_that_are_not_here():
    loading.check(ModelSpec("a/b", device="cpu"))
    with pytest.raises(errors.InvalidOption, match="is not here"):
        loading.check(ModelSpec("a/b", device="cuda:77"))


def test_loading_says_what_cannot_be_loaded(tmp_path, monkeypatch):
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(errors.PatchkitError, match="damaged"):
        loading.load(ModelSpec(str(tmp_path), device="cpu"))
    (tmp_path / "model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    with pytest.raises(errors.UnsupportedModel, match="NoSuchPipeline"):
        loading.load(ModelSpec(str(tmp_path), device="cpu"))
    (tmp_path / "model_index.json").unlink()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(errors.PatchkitError, match="could not be loaded"):
        loading.load(ModelSpec(str(tmp_path), device="cpu"))


def test_dtype_and_offload_are_diffusers_own(picture_folder):
    loaded = loading.load(ModelSpec(str(picture_folder), dtype="bf16", device="cpu", offload="model"), quiet=True)
    assert loaded.target.unet.dtype == torch.bfloat16
    assert hasattr(loaded.target.unet, "_hf_hook")
    assert isinstance(loaded, Loaded)


def test_a_saved_patch_runs_again(picture_folder, here):
    pipe = loading.load(ModelSpec(str(picture_folder), device="cpu"), quiet=True).target
    with patchkit.apply(pipe, "dimming", density=0.25, layers="0-1") as patch:
        patch.save("saved.yaml")
    with patchkit.apply(pipe, "saved.yaml") as again:
        assert again.recipes == patch.recipes
