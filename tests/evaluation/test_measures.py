"""What is measured on one result, where the answer is known."""

from __future__ import annotations

import random

import pytest
import testing_recipes  # noqa: F401  registers its recipes
import tiny
import torch
from PIL import Image

from patchkit.evaluation import measures, request, suite
from patchkit.evaluation.learned import Learned
from patchkit.evaluation.measures import Result
from patchkit.recipe_files import files, yamlread
from patchkit.zoo import world, worlds

SCENE = world.sample_scene(random.Random(3), ("circle", "red", "white", "right"))
CLIPS = worlds.of("video")


def result(clip):
    return measures.result_of("video", clip)


@pytest.fixture(scope="module")
def clip():
    return world.render([SCENE], torch.linspace(0, 1, 17))[0]


def test_a_right_clip_that_equals_dense(clip):
    found = measures.figures(result(clip), result(clip), SCENE.caption, CLIPS, Learned())
    assert found["identical"]
    assert found["verdict"]["all"]
    assert "psnr" not in found["values"]  # infinite: left out, never a number
    assert found["values"]["ssim"] == pytest.approx(1)
    assert found["values"]["outside_mae"] == 0
    assert found["values"]["flicker"] < 0.1  # outlines along the way change slowly, in steps of 8 bits


def test_changes_of_the_object_are_not_outside_it(clip):
    """Another colour of the object changes nothing outside the objects; another background does, by a known amount."""
    green = clip.clone()
    inside = (clip - torch.tensor(world.BACKGROUNDS["white"]).view(3, 1, 1)).abs().amax(dim=1, keepdim=True) > 0.02
    green = torch.where(inside, clip.flip(1), clip)
    found = measures.figures(result(green), result(clip), SCENE.caption, CLIPS, Learned())
    assert found["values"]["outside_mae"] == 0
    assert found["values"]["psnr"] < 30
    assert not found["identical"]
    darker = (clip - 20 / 255).clamp(0, 1)
    found = measures.figures(result(darker), result(clip), SCENE.caption, CLIPS, Learned())
    assert found["values"]["outside_mae"] == pytest.approx(20, abs=0.01)


def test_an_edit_is_compared_with_its_source_outside_its_mask(clip, tmp_path):
    picture = Image.new("RGB", (64, 64), (100, 100, 100))
    picture.save(tmp_path / "s.png")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    mask.save(tmp_path / "m.png")
    edited = torch.full((5, 3, 64, 64), 110 / 255)
    edited[..., :32] = 1  # the left half may change
    edit = measures.read_edit(tmp_path / "s.png", tmp_path / "m.png", tuple(edited.shape))
    found = measures.figures(result(edited), None, "p", None, Learned(), edit)
    assert found["values"]["outside_mae"] == pytest.approx(10, abs=1e-3)
    wrong = measures.figures(result(edited[..., :48, :]), None, "p", None, Learned(), edit)
    assert "outside_mae" not in wrong["values"]
    assert "the source is 1 x 64 x 64" in wrong["notes"]["outside"]


def test_free_prompts_are_not_judged(clip):
    assert measures.figures(result(clip), None, "a cat", CLIPS, Learned())["verdict"] is None


def test_results_of_other_sizes_are_not_compared(clip):
    found = measures.figures(result(clip), result(clip[..., :32]), SCENE.caption, CLIPS, Learned())
    assert found["notes"]["psnr"] == "the sizes differ"
    assert not {"psnr", "ssim", "outside_psnr"} & set(found["values"])


def test_texts():
    found = measures.figures(Result("text", text="a"), Result("text", text="b"), "p", None, Learned())
    assert found["identical"] is False
    assert found["values"] == {}


def test_a_text_model_from_end_to_end(tmp_path):
    from tiny import tokenizers

    tiny.MODELS["llama"].build().save_pretrained(tmp_path / "model")
    tokenizers.llama().save_pretrained(tmp_path / "model")
    text = f"version: 1\nmodel: {tmp_path / 'model'}\nrecipes: [dimming]\n"
    text += f"inputs: {{prompt: [hello, '<b>'], max_new_tokens: 4, min_new_tokens: 4}}\noutput: {tmp_path / 'out'}/\n"
    wanted = request.make([("d", files.parse(yamlread.read_text(text, "r.yaml")))])
    found = suite.run(wanted, say=lambda text: None)
    figures = found.summary["variants"]["d"]["figures"]
    assert figures["evaluations"]["value"] == 4
    assert 0 <= figures["identical"]["value"] <= 1
    assert "psnr" not in figures
    page = found.files["page"].read_text()
    assert page.count("<figure") == page.count("<pre>") - 1 == 4  # and one with the options
    assert "&lt;b&gt;" in page
    assert len(list((tmp_path / "out" / "frames").glob("*.txt"))) == 4
