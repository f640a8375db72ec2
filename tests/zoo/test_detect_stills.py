"""The detectors of stills are right on clean pictures, stand some dirt, and say "none" where nothing is clear."""

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from patchkit.zoo import stills, world
from patchkit.zoo.detect_stills import ATTRIBUTES, NONE, detect, score
from patchkit.zoo.stills import Description, Item

ALL = ("", "item", "scene")


def _stills(n, seed=0, pairs=0.6):
    rng = random.Random(seed)
    return [stills.draw(stills.sample_description(rng, pairs, ALL), rng) for _ in range(n)]


def _shares(pictures, wanted):
    rows = [score(p, w) for p, w in zip(pictures, wanted, strict=True)]
    names = (*ATTRIBUTES, "all")
    return {name: sum(r[name] for r in rows if name in r) / sum(name in r for r in rows) for name in names}


def _picture(text, seed=0):
    return stills.render([stills.draw(Description.parse(text), random.Random(seed))])[0]


def test_clean_pictures():
    wanted = _stills(200)
    shares = _shares(stills.render(wanted), wanted)
    assert min(shares.values()) >= 0.95, shares


@pytest.mark.parametrize("dirt", ["noise", "shift", "fade", "flat"])
def test_some_dirt(dirt):
    wanted = _stills(40, seed=1)
    pictures = stills.render(wanted, strength=0.0 if dirt == "flat" else stills.GRAIN)
    if dirt == "noise":
        pictures = pictures + 0.05 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    elif dirt == "shift":
        pictures = pictures + torch.tensor([0.04, -0.03, 0.02]).view(3, 1, 1)
    elif dirt == "fade":
        pictures = 0.5 + 0.93 * (pictures - 0.5)
    shares = _shares(pictures.clamp(0, 1), wanted)
    assert min(shares.values()) >= 0.95, shares


def test_wrong_pictures_are_wrong():
    wanted = _stills(60, seed=2)
    shares = _shares(stills.render(wanted).roll(1, 0), wanted)
    assert shares["all"] <= 0.05
    assert max(shares[name] for name in ("background", "colour", "shape", "position")) < 0.65, shares


def test_a_change_is_seen_where_it_is_and_nowhere_else():
    text = "a red circle left of a green square on a white background"
    described = Description.parse(text)
    assert score(_picture(text), text) == dict.fromkeys((*ATTRIBUTES, "all"), True)
    first, second = described.items
    changes = {
        "background": replace(described, background="gray"),
        "colour": replace(described, items=(first, Item("yellow", "square"))),
        "shape": replace(described, items=(Item("red", "triangle"), second)),
        "position": replace(described, position="right of"),
    }
    for name, other in changes.items():
        right = detect(_picture(other.caption)).right(described)
        assert [k for k, ok in right.items() if not ok] == [name]
    lonely = detect(_picture("a red circle at the left on a white background")).right(described)
    assert not any(lonely[k] for k in ("count", "colour", "shape", "position"))
    swapped = replace(described, items=(Item("green", "circle"), Item("red", "square")))
    right = detect(_picture(swapped.caption)).right(described)
    assert [k for k, ok in right.items() if not ok] == ["colour"]  # a colour belongs to its object


def test_attributes_that_are_not_spoken_of_are_not_judged():
    assert "position" not in score(_picture("a red circle on a blue background"), "a red circle on a blue background")
    assert set(score(_picture("an empty blue background"), "an empty blue background")) == {
        "background",
        "count",
        "all",
    }


def test_objects_are_found_where_they_are():
    for still in _stills(20, seed=3, pairs=0.9):
        read = detect(stills.render([still])[0])
        for found, (x, y, _) in zip(read.match(still.description), still.spots, strict=True):
            assert abs(found.x - x / 64) < 0.02
            assert abs(found.y - y / 64) < 0.02
            assert found.mask[int(y), int(x)]
            assert found.iou > 0.9


@pytest.mark.parametrize("kind", ["noise", "gradient", "stripes"])
def test_pictures_without_anything(kind):
    if kind == "noise":
        picture = torch.rand((3, 64, 64), generator=torch.Generator().manual_seed(0))
    elif kind == "gradient":
        picture = torch.linspace(0, 1, 64).expand(3, 64, 64)
    else:
        picture = (torch.arange(64) // 8 % 2).float().expand(3, 64, 64)
    read = detect(picture)
    assert read.background == NONE
    assert read.objects == ()


def test_unclear_objects_are_none():
    picture = torch.full((3, 64, 64), 0.94)
    picture[:, 10:54, 28:36] = torch.tensor(world.COLOURS["red"]).view(3, 1, 1)  # a bar is no shape
    (bar,) = detect(picture).objects
    assert (bar.colour, bar.shape) == ("red", NONE)
    picture = torch.full((3, 64, 64), 0.94)
    picture[:, 20:44, 20:44] = torch.tensor([0.35, 0.30, 0.25]).view(3, 1, 1)  # brown is no colour of the world
    assert detect(picture).objects == ()
    diagonal = _picture("a red circle and a green square on a white background").clone()
    diagonal[:] = torch.tensor(world.BACKGROUNDS["white"]).view(3, 1, 1)
    for name, at in (("red", 8), ("green", 36)):
        diagonal[:, at : at + 19, at : at + 19] = torch.tensor(world.COLOURS[name]).view(3, 1, 1)
    read = detect(diagonal)
    assert [o.shape for o in read.objects] == ["square", "square"]
    assert read.objects[0].relation(read.objects[1]) == NONE
    assert read.objects[0].place == NONE


def test_too_many_objects_are_counted():
    picture = _picture("a red circle left of a green square on a white background")
    picture[:, 2:14, 26:38] = torch.tensor(world.COLOURS["blue"]).view(3, 1, 1)
    right = detect(picture).right(Description.parse("a red circle left of a green square on a white background"))
    assert not right["count"]
    assert right["colour"]


def test_inputs_of_any_kind():
    text = "a yellow triangle above a red circle on a black background"
    picture = _picture(text)
    assert score(picture, text) == score(picture.permute(1, 2, 0).numpy(), Description.parse(text))
    blurred = F.avg_pool2d(picture[None], 9, stride=1, padding=4)[0]
    assert not score(blurred, text)["shape"]
