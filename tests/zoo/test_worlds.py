"""The fixed prompts are always the same and balanced; the judges agree with the detectors they stand on."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from patchkit.zoo import detect, detect_stills, stills, world, worlds

TIMES = torch.linspace(0, 1, 17)


@pytest.mark.parametrize("name", ["video", "image"])
def test_more_prompts_begin_with_the_fewer(name):
    found = worlds.of(name)
    assert found.prompts(20)[:7] == found.prompts(7)
    assert len(set(found.prompts(60))) == 60


def test_the_first_prompts_never_change():
    """Figures of different days are of the same prompts."""
    assert worlds.of("video").prompts(2) == (
        "a red circle standing still on a blue background",
        "a blue triangle moving left on a black background",
    )
    assert worlds.of("zoo/dit").prompts(2) == (
        "a yellow circle in the center on a white background",
        "a purple circle left of a yellow triangle on a black background",
    )


def test_clips_are_balanced():
    wanted = [detect.Attributes.of_prompt(p) for p in worlds.of("video").prompts(30)]
    for attribute, values in (("shape", world.SHAPES), ("colour", world.COLOURS), ("motion", world.MOTIONS)):
        counts = Counter(getattr(w, attribute) for w in wanted)
        assert set(counts) == set(values)
        assert max(counts.values()) - min(counts.values()) <= 3


def test_stills_have_one_and_two_objects_by_turns():
    wanted = [stills.Description.parse(p) for p in worlds.of("image").prompts(20)]
    assert [len(w.items) for w in wanted] == [1, 2] * 10
    assert all(w.position and not w.held_out for w in wanted)
    assert {w.background for w in wanted} == set(world.BACKGROUNDS)


def test_a_model_without_a_world():
    assert worlds.of("gemma") is None


def test_judging_a_clip():
    scene = world.sample_scene(random.Random(0), ("square", "red", "white", "right"))
    clip = world.render([scene], TIMES)[0]
    found = worlds.of("video").judge(clip, scene.caption)
    assert found.all
    assert found.right | {"all": True} == detect.score(clip, scene.caption)
    other = worlds.of("video").judge(clip, scene.caption.replace("red square", "green circle"))
    assert other.right == {"background": True, "colour": False, "shape": False, "motion": True}
    assert other.objects == [{"wanted": "green circle", "found": True, "colour": False, "shape": False}]
    assert other.read == {"background": "white", "colour": "red", "shape": "square", "motion": "right"}
    with pytest.raises(ValueError, match="not a caption"):
        worlds.of("video").judge(clip, "a cat")


def test_objects_of_a_clip_are_where_they_are():
    scene = world.sample_scene(random.Random(0), ("circle", "red", "white", "right"))
    clip = world.render([scene], TIMES)[0]
    mask = worlds.of("video").objects(clip)
    away = (clip - torch.tensor(world.BACKGROUNDS["white"]).view(3, 1, 1)).abs().amax(dim=1) > 0.3
    assert mask.shape == (17, 64, 64)
    assert (mask == away).float().mean() > 0.98
    assert worlds.of("video").objects(torch.rand(5, 3, 64, 64)) is None


def test_judging_a_still():
    text = "a red circle left of a green square on a white background"
    still = stills.draw(stills.Description.parse(text), random.Random(0))
    picture = stills.render([still])[0]
    judge = worlds.of("image").judge
    assert judge(picture, text).all
    found = judge(picture, text.replace("green square", "blue square"))
    assert found.right == detect_stills.detect(picture).right(
        stills.Description.parse(text.replace("green square", "blue square"))
    )
    assert [(o["wanted"], o["colour"], o["shape"]) for o in found.objects] == [
        ("red circle", True, True),
        ("blue square", False, True),
    ]
    assert set(found.read["objects"].split(", ")) == {"red circle", "green square"}
    mask = worlds.of("image").objects(picture)
    assert mask.shape == (1, 64, 64)
    assert 0.1 < mask.float().mean() < 0.4
    assert worlds.of("image").objects(torch.full((3, 64, 64), 0.94)) is None
