"""Captions, scenes and pictures of the stills."""

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from patchkit.zoo import stills
from patchkit.zoo.stills import Description, Item
from patchkit.zoo.world import BACKGROUNDS, COLOURS, SIZE


def _draw(text, seed=0):
    return stills.draw(Description.parse(text), random.Random(seed))


@pytest.mark.parametrize("count", [0, 1, 2])
def test_captions_and_descriptions_are_the_same_thing(count):
    everything = stills.descriptions(count)
    assert len({d.caption for d in everything}) == len(everything) == (4, 414, 4950)[count]
    for description in everything:
        assert Description.parse(description.caption) == description
        assert description.reversed.reversed == description


@pytest.mark.parametrize(
    "text",
    [
        "a red circle left of a green square on a blue background",
        "an orange circle above a yellow triangle on a black background",
        "a red circle and a green square on a gray background",
        "a red circle at the left on a blue background",
        "a purple triangle in the center on a white background",
        "an empty white background",
    ],
)
def test_captions_read_as_english(text):
    assert Description.parse(text).caption == text
    assert Description.parse(f"  {text.capitalize()}. ").caption == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a red circle", "expected 'a <colour>"),
        ("a red circle moving left on a blue background", "expected"),
        ("a red circle left of a red square on a blue background", "differ in colour"),
        ("a blue circle on a blue background", "differ in colour"),
        ("", "expected"),
    ],
)
def test_other_texts_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Description.parse(text)


def test_what_is_held_out_never_comes_and_does_not_depend_on_the_wording():
    rng = random.Random(0)
    seen = [stills.sample_description(rng) for _ in range(2000)]
    assert {d.held_out for d in seen} == {""}
    items = {(i.colour, i.shape) for d in seen for i in d.items}
    assert len(items) == 15
    assert not items & stills.HELD_OUT_ITEMS
    assert {i.colour for d in seen for i in d.items} == set(COLOURS)  # every word is seen, in other company
    kinds = dict.fromkeys(("", "item", "scene"), 0)
    for description in stills.descriptions(2):
        assert description.held_out == description.reversed.held_out
        kinds[description.held_out] += 1
    assert 0.05 < kinds["scene"] / len(stills.descriptions(2)) < 0.12
    assert {stills.sample_description(rng, held_out=("item",)).held_out for _ in range(50)} == {"item"}


def test_shares_of_the_scenes():
    rng = random.Random(1)
    counts = [len(stills.sample_description(rng, pairs=0.5).items) for _ in range(2000)]
    assert 0.46 < counts.count(2) / 2000 < 0.54
    assert 0.02 < counts.count(0) / 2000 < 0.045


def test_objects_are_where_the_caption_says_and_apart():
    rng = random.Random(2)
    for _ in range(300):
        still = stills.draw(stills.sample_description(rng, pairs=1.0), rng)
        (x1, y1, r1), (x2, y2, r2) = still.spots
        dx, dy = stills.RELATIONS[still.description.position or "left of"]
        if still.description.position:
            assert (x1 - x2) * dx + (y1 - y2) * dy > 30
        for x, y, r in still.spots:  # a triangle is the widest, 1.25 radii
            assert 1.25 * r < x < 64 - 1.25 * r
            assert 1.08 * r < y < 64 - 1.08 * r
        assert max(abs(x1 - x2) / 1.25, abs(y1 - y2) / 1.08) > r1 + r2


def test_the_grain_is_white_at_the_latents_and_smooth_between():
    grain = stills.grain(range(200))
    means = F.avg_pool2d(grain, 4)
    assert means.std().item() == pytest.approx(1.0, abs=0.02)
    centred = means - means.mean()
    assert abs((centred[..., 1:] * centred[..., :-1]).mean().item()) < 0.02
    assert (grain[..., 1:] - grain[..., :-1]).abs().mean() < 0.5 * grain.abs().mean()  # white pixels: 1.4


def test_pictures():
    pictures = [_draw("a red circle at the left on a blue background"), _draw("an empty gray background", 1)]
    flat = stills.render(pictures, strength=0.0)
    assert flat.shape == (2, 3, 64, 64)
    x, y, _ = pictures[0].spots[0]
    assert torch.allclose(flat[0, :, int(y), int(x)], torch.tensor(COLOURS["red"]))
    assert torch.allclose(flat[0, :, 32, 60], torch.tensor(BACKGROUNDS["blue"]))
    assert flat[1].flatten(1).std(dim=1).max() < 1e-6
    grained = stills.render(pictures)
    assert torch.equal(grained, stills.render(pictures))
    assert (grained - flat).std().item() == pytest.approx(stills.GRAIN * 1.2, rel=0.15)
    one = stills.render(pictures[1:])
    assert torch.equal(one[0], grained[1])  # a picture does not depend on its batch


def test_items_speak_english():
    assert str(Item("orange", "square")) == "an orange square"
    assert str(Item("red", "square")) == "a red square"


def test_outlines_without_a_name_have_any_colour_and_stay_in_place():
    rng = random.Random(3)
    shown = [stills.reshape(stills.draw(stills.sample_description(rng, 1.0), rng), rng) for _ in range(60)]
    pairs = {(i.colour, i.shape) for s in shown for i in s.description.items}
    assert pairs >= set(stills.HELD_OUT_ITEMS)  # what a shape never has, an outline has
    flat = stills.render(shown, strength=0)
    axis = torch.arange(SIZE) + 0.5
    for still, picture in zip(shown, flat, strict=True):
        back = torch.tensor(BACKGROUNDS[still.description.background]).view(3, 1, 1)
        colours = {still.description.background, *(i.colour for i in still.description.items)}
        assert len(colours) == 3
        painted = (picture - back).abs().amax(dim=0) > 1e-3
        around = torch.zeros_like(painted)
        for (x, y, radius), paint in zip(still.spots, still.paints, strict=True):
            near = ((axis - x).square()[None, :] + (axis - y).square()[:, None]).sqrt() < radius + 1
            around |= near
            full = (picture[:, near] - torch.tensor(paint).view(3, 1)).abs().amax(dim=0) < 1e-3
            assert 0.2 < full.float().mean() < 0.95  # neither a speck nor the whole disc
        assert not (painted & ~around).any()
    assert (flat - stills.render([replace(s, lobes=()) for s in shown], strength=0)).abs().flatten(1).amax(
        1
    ).min() > 0.1
