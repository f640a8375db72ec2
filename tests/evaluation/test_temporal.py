"""Clips whose smoothness and flicker are known."""

from __future__ import annotations

import math
import random

import pytest
import torch

from patchkit.evaluation import temporal
from patchkit.zoo import world

TIMES = torch.linspace(0, 1, 17)


def clip_of(motion):
    return world.render([world.sample_scene(random.Random(1), ("square", "red", "white", motion))], TIMES)[0]


def test_what_stands_still_is_perfect():
    found = temporal.figures(clip_of("still"))
    assert found == pytest.approx({"smoothness": 1, "smoothness_worst": 1, "flicker": 0}, abs=1e-6)


def test_what_moves_does_not_flicker():
    found = temporal.figures(clip_of("right"))
    assert found["flicker"] == 0
    assert 0.9 < found["smoothness_worst"] <= found["smoothness"] < 1


def test_alternating_black_and_white():
    """Colours are opposite (-1), outlines are nothing both times (1); each second difference is 2 x 255."""
    clip = torch.zeros(6, 3, 16, 16)
    clip[1::2] = 1
    assert temporal.figures(clip) == pytest.approx({"smoothness": 0, "smoothness_worst": 0, "flicker": 510}, abs=1e-4)


@pytest.mark.parametrize("size", [0.01, 0.1])
def test_trembling_of_known_size(size):
    """x(t) = 0.4 +- size by turns, over a part of the picture: 4 x size there, 0 elsewhere."""
    clip = clip_of("still")
    part = torch.zeros(64, 64)
    part[:16] = 1
    sign = torch.tensor([(-1.0) ** t for t in range(17)]).view(-1, 1, 1, 1)
    trembling = 0.4 + 0.2 * clip + size * sign * part
    assert temporal.flicker(trembling) == pytest.approx(4 * size * 255 / 4, rel=1e-4)


def test_noise_of_known_size():
    """Second differences of white noise have sqrt(6) times its deviation; the median size is 0.6745 of it."""
    generator = torch.Generator().manual_seed(0)
    clip = 0.5 + 0.02 * torch.randn(97, 3, 32, 32, generator=generator)
    assert temporal.flicker(clip) == pytest.approx(0.67449 * math.sqrt(6) * 0.02 * 255, rel=0.02)


def test_fading_does_not_flicker():
    clip = torch.linspace(0.2, 0.8, 9).view(-1, 1, 1, 1).expand(9, 3, 16, 16)
    assert temporal.flicker(clip) == pytest.approx(0, abs=1e-4)


def test_a_flash_is_seen_by_the_worst_step_only():
    clip = clip_of("still").clone()
    clip[8] = 1 - clip[8]
    found = temporal.figures(clip)
    assert found["flicker"] == 0
    assert found["smoothness_worst"] < 0.5 < found["smoothness"]


def test_jumps_cost_more_than_steps():
    steady, jumpy = clip_of("right"), clip_of("right")[torch.tensor([0, 16] * 8 + [0])]
    assert temporal.figures(jumpy)["smoothness"] < temporal.figures(steady)["smoothness"] - 0.05


def test_features_turn_with_the_picture():
    """A ramp to the right has all its gradients in direction 0, the same ramp upside down in the opposite one."""
    ramp = torch.linspace(0, 1, 18).view(1, 1, 1, -1).expand(1, 3, 18, 18)
    for picture, direction in ((ramp, 0), (ramp.flip(-1), 4), (ramp.mT, 2), (ramp.mT.flip(-2), 6)):
        outlines = temporal.frame_features(picture)[1].view(8, 16)
        assert outlines[direction].square().sum() == pytest.approx(1, abs=1e-5)


def test_too_short_to_tell():
    assert temporal.figures(torch.zeros(2, 3, 16, 16)) == {}


def test_cscv_is_its_formula_and_falls_with_a_jump() -> None:
    rows = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)) + 3
    unit = rows / rows.norm(dim=1, keepdim=True)
    likeness = (unit[1:] * unit[:-1]).sum(1)
    variation = (likeness - likeness.mean()).square().mean().sqrt() / likeness.mean()
    assert temporal.cscv(rows) == pytest.approx(float(1 / (1 + 10 * variation)), abs=1e-5)
    angle = torch.linspace(0, 1, 20)
    even = torch.stack([angle.cos(), angle.sin()], 1)
    jump = torch.cat([even[:1].expand(10, -1), even[-1:].expand(10, -1)])
    assert temporal.cscv(even) == pytest.approx(1, abs=1e-4)
    assert temporal.cscv(jump) < 0.6
