"""Captions, scenes and pictures of the shape world."""

import random

import pytest
import torch

from patchkit.zoo import text, world
from patchkit.zoo.detect import Attributes


def test_every_caption_can_be_parsed_back():
    for shape, colour, background, motion in world.combinations():
        caption = world.Scene(shape, colour, background, motion).caption
        assert Attributes.of_prompt(caption) == Attributes(background, colour, shape, motion)


def test_captions_are_all_different_and_never_hide_the_object():
    combinations = world.combinations()
    captions = {world.Scene(*c).caption for c in combinations}
    assert len(captions) == len(combinations) == 345
    assert all(colour != background for _, colour, background, _ in combinations)


@pytest.mark.parametrize("prompt", ["", "a red circle", "a pink circle moving left on a white background", "hello"])
def test_other_texts_are_refused_with_the_grammar(prompt):
    with pytest.raises(ValueError, match="expected 'a <colour> <shape>"):
        Attributes.of_prompt(prompt)


def test_parsing_forgives_case_spaces_articles_and_the_full_stop():
    wanted = Attributes("blue", "orange", "square", "still")
    assert Attributes.of_prompt(" An ORANGE  square standing still on a blue background. ") == wanted


def test_every_word_is_one_known_token():
    tokenizer = text.t5_tokenizer()
    for combination in world.combinations():
        caption = world.Scene(*combination).caption
        ids = tokenizer(caption).input_ids
        assert len(ids) == len(caption.split()) + 1 <= text.MAX_TOKENS
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == caption


def test_render_draws_what_the_scene_says():
    scene = world.Scene("square", "green", "gray", "right", x=30, y=40, radius=13, travel=20)
    clip = world.render([scene], torch.tensor([0.0, 0.5, 1.0]))[0]
    assert clip.shape == (3, 3, 64, 64)
    green, gray = torch.tensor(world.COLOURS["green"]), torch.tensor(world.BACKGROUNDS["gray"])
    for frame, x in zip(clip, (20, 30, 40), strict=True):
        assert torch.allclose(frame[:, 40, x], green)
        assert torch.allclose(frame[:, 5, 5], gray)
        covered = (frame - gray.view(3, 1, 1)).norm(dim=0).sum() / (green - gray).norm()
        assert covered == pytest.approx((2 * 0.89 * 13) ** 2, rel=0.01)


def test_render_does_not_depend_on_its_neighbours():
    rng = random.Random(3)
    scenes = [world.sample_scene(rng) for _ in range(12)]
    times = torch.tensor([0.1, 0.9])
    together = world.render(scenes, times)
    for scene, clip in zip(scenes, together, strict=True):
        assert torch.equal(world.render([scene], times)[0], clip)


def test_scenes_repeat_with_their_seed():
    draw = lambda seed: [world.sample_scene(r) for r in [random.Random(seed)] for _ in range(5)]  # noqa: E731
    assert draw(1) == draw(1) != draw(2)
