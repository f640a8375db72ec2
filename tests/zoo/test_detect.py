"""The detectors are right on clean clips, stand some dirt, and say "none" where there is nothing to read."""

import random

import pytest
import torch
import torch.nn.functional as F

from patchkit.zoo import world
from patchkit.zoo.detect import ATTRIBUTES, NONE, Attributes, detect, score

TIMES = torch.linspace(0, 1, world.FRAMES)


def _scenes(n, seed=0):
    rng = random.Random(seed)
    return [world.sample_scene(rng) for _ in range(n)]


def _clips(scenes, every=1):
    return world.render(scenes, TIMES[::every])


def _share_right(clips, scenes):
    rows = [score(clip, scene) for clip, scene in zip(clips, scenes, strict=True)]
    return {name: sum(row[name] for row in rows) / len(rows) for name in (*ATTRIBUTES, "all")}


def test_clean_clips():
    scenes = _scenes(200)
    shares = _share_right(_clips(scenes, every=4), scenes)
    assert min(shares.values()) >= 0.95, shares


@pytest.mark.parametrize("dirt", ["noise", "blur", "shift", "fade"])
def test_some_dirt(dirt):
    scenes = _scenes(40, seed=1)
    clips = _clips(scenes, every=4)
    if dirt == "noise":
        clips = clips + 0.05 * torch.randn(clips.shape, generator=torch.Generator().manual_seed(0))
    elif dirt == "blur":
        padded = F.pad(clips.flatten(0, 1), (1, 1, 1, 1), mode="replicate")
        clips = F.avg_pool2d(padded, 3, stride=1).unflatten(0, clips.shape[:2])
    elif dirt == "shift":
        clips = clips + torch.tensor([0.04, -0.03, 0.02]).view(3, 1, 1)
    else:
        clips = 0.5 + 0.93 * (clips - 0.5)
    shares = _share_right(clips.clamp(0, 1), scenes)
    assert min(shares.values()) >= 0.95, shares


def test_wrong_clips_are_wrong():
    scenes = _scenes(40, seed=2)
    clips = _clips(scenes, every=4)
    shares = _share_right(clips.roll(1, 0), scenes)
    assert shares["all"] <= 0.05
    assert max(shares.values()) < 0.6, shares
    for name in ATTRIBUTES:  # changing one attribute fails that one and no other
        for scene in scenes[:6]:
            other = _change(scene, name)
            wrong = [k for k, ok in detect(_clips([other])[0]).right(Attributes.of_scene(scene)).items() if not ok]
            assert wrong == [name], (scene, other)


def _change(scene, name):
    """A scene that differs in one attribute only."""
    taken = {scene.colour, scene.background}
    values = {
        "shape": world.SHAPES,
        "colour": world.COLOURS,
        "background": world.BACKGROUNDS,
        "motion": world.MOTIONS,
    }[name]
    value = next(v for v in values if v != getattr(scene, name) and v not in taken)
    fields = {k: getattr(scene, k) for k in ("shape", "colour", "background", "motion")} | {name: value}
    return world.Scene(**fields)


@pytest.mark.parametrize("kind", ["black", "noise", "gradient"])
def test_clips_without_an_object(kind):
    if kind == "black":
        clip = torch.full((17, 3, 64, 64), 0.06)
    elif kind == "noise":
        clip = torch.rand((17, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    else:
        clip = torch.linspace(0, 1, 64).expand(17, 3, 64, 64)
    found = detect(clip)
    assert (found.colour, found.shape, found.motion) == (NONE, NONE, NONE)
    assert found.background == ("black" if kind == "black" else NONE)


def test_outlines_that_are_no_shape():
    clip = torch.full((17, 3, 64, 64), 0.94)
    red = torch.tensor(world.COLOURS["red"]).view(3, 1, 1)
    clip[:, :, 20:44, 28:36] = red  # a tall bar
    bar = detect(clip)
    clip[:, :, 28:36, 20:44] = red  # a cross
    cross = detect(clip)
    for found in (bar, cross):
        assert (found.background, found.colour, found.shape, found.motion) == ("white", "red", NONE, "still")


def test_paths_that_are_no_motion():
    scene = world.Scene("circle", "red", "white", "right")
    clip = _clips([scene])[0]
    assert detect(clip).motion == "right"
    assert detect(clip.flip(0)).motion == "left"
    assert detect(clip[torch.randperm(17, generator=torch.Generator().manual_seed(0))]).motion == NONE
    there_and_back = torch.cat([clip[::2], clip.flip(0)[::2][1:]])
    assert detect(there_and_back).motion in (NONE, "still")
    slow = world.render([scene], 0.5 + (TIMES - 0.5) * 0.35)[0]  # neither still nor moving
    assert detect(slow).motion == NONE


def test_wrong_hues_are_none():
    clip = _clips([world.Scene("circle", "red", "white", "still")])[0]
    brown = clip.where((clip[:, 1:2] > 0.5).expand_as(clip), torch.tensor([0.35, 0.30, 0.25]).view(3, 1, 1))
    found = detect(brown)
    assert (found.background, found.colour, found.shape) == ("white", NONE, "circle")


def test_confidence_falls_with_dirt():
    scene = _scenes(1, seed=4)[0]
    clip = _clips([scene])[0]
    noisy = (clip + 0.15 * torch.randn(clip.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    clean, dirty = detect(clip), detect(noisy)
    assert clean.iou > 0.95 > dirty.iou
    assert clean.confidence["background"] > 0.95 > dirty.confidence["background"]


def test_score_takes_scene_attributes_or_prompt():
    scene = _scenes(1, seed=5)[0]
    clip = _clips([scene])[0]
    wanted = dict.fromkeys((*ATTRIBUTES, "all"), True)
    assert score(clip, scene) == score(clip, Attributes.of_scene(scene)) == score(clip, scene.caption) == wanted
    assert score([f.permute(1, 2, 0).numpy() for f in clip], scene) == wanted
