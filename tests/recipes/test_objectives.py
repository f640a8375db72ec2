"""Objectives of a hunt: the shape world's detectors, networks by folder, the paper's rules, and names in files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from patchkit import InvalidOption, MissingDependency
from patchkit.recipes.headhunter import objectives, scorers
from patchkit.recipes.headhunter.objectives import Harmonic, ShapeWorld, Thresholding, build
from patchkit.zoo import stills

CAPTION = "a red circle left of a green square on a blue background"


@pytest.fixture(scope="module")
def picture() -> torch.Tensor:
    still = stills.draw(stills.Description.parse(CAPTION), random.Random(0))
    return stills.render([still])[0]


def test_the_shape_world_is_scored_continuously(picture: torch.Tensor) -> None:
    """Right beats wrong, clear beats noisy at equal attributes, and a wrong caption costs its attributes."""
    score = ShapeWorld()
    parts = score.parts(picture, CAPTION)
    assert all(parts[n] == 1 for n in ("background", "count", "colour", "shape", "position"))
    noise = 0.05 * torch.randn(picture.shape, generator=torch.Generator().manual_seed(0))
    noisy = (picture + noise).clamp(0, 1)
    assert all(score.parts(noisy, CAPTION)[n] == 1 for n in ("background", "count", "colour", "shape"))
    assert 0.5 < score(noisy, CAPTION) < score(picture, CAPTION) <= 1
    other = "a red circle right of a green square on a blue background"
    assert score(picture, other) == pytest.approx(score(picture, CAPTION) - 1 / len(parts))
    assert score(torch.rand(3, 64, 64), CAPTION) < 0.3
    with pytest.raises(ValueError, match="caption"):
        score(picture, "a cat")


def test_clips_are_scored_too() -> None:
    from patchkit.zoo import world

    scene = world.sample_scene(random.Random(0))
    clip = world.render([scene], torch.linspace(0, 1, 17))[0]
    assert ShapeWorld()(clip, scene.caption) > 0.85
    assert ShapeWorld()(torch.rand_like(clip), scene.caption) < 0.4


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of the real class with random weights, and its tokenizer."""
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": 514, "bos_token_id": 512, "eos_token_id": 513, "max_position_embeddings": 77}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=sizes | {"image_size": 16, "patch_size": 8}, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    tiny.tokenizers.clip().save_pretrained(folder)
    return folder


def test_clip_and_pickscore(clip_folder: Path, picture: torch.Tensor) -> None:
    from transformers import AutoTokenizer, CLIPModel

    clip, pick = scorers.clip(str(clip_folder)), scorers.pickscore(str(clip_folder))
    model = CLIPModel.from_pretrained(clip_folder).eval()
    tokens = AutoTokenizer.from_pretrained(clip_folder)(CAPTION, return_tensors="pt")
    with torch.no_grad():
        out = model(**tokens, pixel_values=scorers.prepared(picture, 16))
    assert pick(picture, CAPTION) == pytest.approx(out.logits_per_image.item(), rel=1e-4)
    cosine = out.logits_per_image.item() / model.logit_scale.exp().item()
    assert clip(picture, CAPTION) == pytest.approx(100 * cosine, rel=1e-4)
    styled = scorers.clip(str(clip_folder), template="A photo depicts {prompt}")
    assert styled(picture, CAPTION) == clip(picture, f"A photo depicts {CAPTION}")


def test_aesthetics(tmp_path: Path, picture: torch.Tensor) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPVisionModelWithProjection(
        CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=8)
    ).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights |= {"layers.0.weight": torch.randn(4, 8), "layers.0.bias": torch.zeros(4)}
    weights |= {"layers.10.weight": torch.ones(1, 4), "layers.10.bias": torch.full((1,), 5.0)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    score = scorers.aesthetic(str(tmp_path))
    assert [layer.out_features for layer in score.head] == [4, 1], "in order of their numbers, not of their names"
    assert score(picture, "a") == score(picture, "b")
    assert score(picture, "") != score(1 - picture, "")


@pytest.mark.parametrize("name", ["clip", "pickscore", "aesthetic"])
def test_a_model_that_cannot_be_had_is_an_error_with_a_remedy(name: str, tmp_path: Path) -> None:
    with pytest.raises(MissingDependency, match="any function"):
        build({name: str(tmp_path)})


def first(image: Any, prompt: str) -> float:
    return float(image[0])


def second(image: Any, prompt: str) -> float:
    return float(image[1])


def test_the_papers_rules_rank_by_means() -> None:
    """Thresholds hold for the mean over the pictures of a head, not for each picture."""
    both = Harmonic((first, second))
    scores = [both((20.0, 10.0), ""), both((40.0, 50.0), "")]
    assert objectives.rank(both, scores) == pytest.approx(2 * 30 * 30 / 60)
    assert objectives.rank(both, [both((0.0, 1.0), "")]) == objectives.LEAST
    rule = Thresholding(second, ((first, 20.0),))
    assert objectives.rank(rule, [rule((10.0, 3.0), ""), rule((30.0, 5.0), "")]) == 4
    assert objectives.rank(rule, [rule((10.0, 3.0), "")]) == objectives.LEAST
    assert objectives.name_of(rule) == "second where first >= 20"
    assert objectives.rank(first, [1.0, 2.0]) == 1.5
    json.dumps(rule((1.0, 2.0), ""))  # stores keep the parts


def test_objectives_of_recipe_files(clip_folder: Path) -> None:
    assert build("shape-world") == ShapeWorld()
    assert build("math:hypot")(3, 4) == 5
    spec = {"harmonic": ["shape-world", {"clip": {"id": str(clip_folder), "template": "A photo depicts {prompt}"}}]}
    assert build(spec).of[1].template == "A photo depicts {prompt}"
    rule = build({"thresholding": {"by": "shape-world", "floors": [["math:hypot", 2]]}})
    assert rule.floors[0][1] == 2
    for wrong in ("shape-word", "math:nothing", "nowhere:x", "math:pi", {"clip": 3}, {"a": 1, "b": 2}, ["clip"]):
        with pytest.raises(InvalidOption):
            build(wrong)
    with pytest.raises(InvalidOption, match="did you mean 'shape-world'"):
        build("shape-word")
