"""``apply``, ``plan``, ``status``, ``remove`` and the handle, from the side of the user."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from fingerprint import assert_same, fingerprint
from mechanism.toys import Counter, Identity, Replace, Scale, Watch

import patchkit


@pytest.fixture
def pipe() -> Any:
    return tiny.PIPELINES["wan21"].build()


ENTRY = tiny.PIPELINES["wan21"]


# --- what may be given


def test_by_name_with_options(pipe: Any) -> None:
    plain = tiny.run(ENTRY, pipe)
    with patchkit.apply(pipe, "toy-scale", factor=0.25, layers="1") as patch:
        assert patch.recipes == [Scale(factor=0.25, layers="1")]
        assert not torch.equal(tiny.run(ENTRY, pipe), plain)


def test_by_list_of_names_and_recipes(pipe: Any) -> None:
    with patchkit.apply(pipe, ["toy-identity", Scale(layers="0"), "toy-scale"]) as patch:
        assert [r.name for r in patch.recipes] == ["toy-identity", "toy-scale", "toy-scale"]
        tiny.run(ENTRY, pipe)
        assert [r["sites"] for r in patch.report()["recipes"]] == [4, 2, 4]
        assert [sum(r["left"].values()) for r in patch.report()["recipes"]] == [0, 2, 0]


@pytest.mark.parametrize("kind", [str, Path])
def test_by_file(pipe: Any, tmp_path: Path, kind: Any) -> None:
    with patchkit.apply(pipe, [Scale(factor=0.25), Identity(layers="1")]) as patch:
        scaled = tiny.run(ENTRY, pipe)
        path = patch.save(tmp_path / "mine.yaml")
    with patchkit.apply(pipe, kind(path)) as patch:
        assert patch.recipes == [Scale(factor=0.25), Identity(layers="1")]
        assert torch.equal(tiny.run(ENTRY, pipe), scaled)


@pytest.mark.parametrize(
    ("spec", "options", "error"),
    [
        ("toy-scael", {}, patchkit.UnknownRecipe),
        ([], {}, patchkit.UnknownRecipe),
        (None, {}, patchkit.UnknownRecipe),
        (3, {}, patchkit.UnknownRecipe),
        (Scale, {}, patchkit.UnknownRecipe),
        ([None], {}, patchkit.UnknownRecipe),
        (Scale(), {"factor": 1.0}, patchkit.InvalidOption),
        (["toy-scale"], {"factor": 1.0}, patchkit.InvalidOption),
        ("missing.yaml", {}, patchkit.RecipeFileError),
        ("missing.yaml", {"factor": 1.0}, patchkit.InvalidOption),
    ],
    ids=str,
)
def test_what_names_no_recipe(pipe: Any, spec: Any, options: dict[str, Any], error: type[Exception]) -> None:
    before = fingerprint(pipe)
    with pytest.raises(error):
        patchkit.apply(pipe, spec, **options)
    assert_same(before, fingerprint(pipe))


def unsupported() -> dict[str, Any]:
    from diffusers import DDIMScheduler, DiffusionPipeline

    class Empty(DiffusionPipeline):
        def __init__(self) -> None:
            super().__init__()

    model = tiny.MODELS["llama"].build()
    return {
        "None": None,
        "str": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "nn.Linear": torch.nn.Linear(2, 2),
        "class": type(model),
        "scheduler": DDIMScheduler(),
        "no denoiser": Empty(),
        "tokenizer": tiny.PIPELINES["sd15"].build().tokenizer,
        "config": model.config,
    }


@pytest.mark.parametrize(
    "name", ["None", "str", "nn.Linear", "class", "scheduler", "no denoiser", "tokenizer", "config"]
)
def test_unsupported_objects(name: str) -> None:
    target = unsupported()[name]
    before = dict(getattr(target, "__dict__", {}))
    for attempt in (patchkit.apply, patchkit.plan):
        with pytest.raises(patchkit.UnsupportedModel) as error:
            attempt(target, Identity())
        assert "do:" in str(error.value), "it says no remedy"
    for attempt in (patchkit.status, patchkit.remove):
        with pytest.raises(patchkit.UnsupportedModel):
            attempt(target)  # type: ignore[operator]
    assert dict(getattr(target, "__dict__", {})) == before


def test_a_model_without_attention_to_patch() -> None:
    from transformers import ResNetConfig, ResNetModel

    model = ResNetModel(ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1]))
    with pytest.raises(patchkit.NothingMatched, match="the model has none"):
        patchkit.apply(model, Identity())


@pytest.mark.parametrize("when", ["plan", "apply"])
def test_a_recipe_of_another_family(pipe: Any, when: str) -> None:
    from dataclasses import dataclass

    @patchkit.recipe("toy-words")
    @dataclass(frozen=True)
    class Words(Identity):
        families = ("transformers",)

    with pytest.raises(patchkit.UnsupportedModel, match="for transformers models, not for diffusers"):
        getattr(patchkit, when)(pipe, Words())


def test_a_run_recipe_on_a_model() -> None:
    from mechanism.toys import Loudness

    with pytest.raises(patchkit.UnsupportedModel, match="whole pipeline runs"):
        patchkit.apply(ENTRY.build().transformer, Loudness())


# --- the handle


def test_life_of_a_handle(pipe: Any) -> None:
    plain = tiny.run(ENTRY, pipe)
    before = fingerprint(pipe)
    patch = patchkit.apply(pipe, Scale())
    assert patch.active
    assert patch.enabled
    assert "toy-scale on WanPipeline" in repr(patch)
    tiny.run(ENTRY, pipe)
    live = patch.report().to_dict()
    assert patch.remove() == []
    assert patch.remove() == []
    assert not patch.active
    assert not patch.enabled
    assert patch.report().to_dict() == live
    assert "(removed)" in repr(patch)
    for act in (patch.disable, patch.enable):
        with pytest.raises(patchkit.PatchkitError, match="has been removed"):
            act()
    assert torch.equal(tiny.run(ENTRY, pipe), plain)
    assert_same(before, fingerprint(pipe))


def test_disabling_one_of_two(pipe: Any) -> None:
    with patchkit.apply(pipe, Scale(factor=0.25)):
        alone = tiny.run(ENTRY, pipe)
    one, two = patchkit.apply(pipe, Scale(factor=0.25)), patchkit.apply(pipe, Scale(factor=0.5))
    assert not torch.equal(tiny.run(ENTRY, pipe), alone)
    two.disable()
    assert torch.equal(tiny.run(ENTRY, pipe), alone)
    assert [r["enabled"] for r in patchkit.status(pipe)["recipes"]] == [True, False]
    one.remove()
    two.remove()


def test_removing_everything(pipe: Any) -> None:
    before = fingerprint(pipe)
    patches = [patchkit.apply(pipe, r) for r in (Identity(), Scale(), Counter())]
    assert patchkit.remove(pipe) == []
    assert not any(p.active for p in patches)
    assert patchkit.remove(pipe) == []
    assert_same(before, fingerprint(pipe))


def test_status(pipe: Any) -> None:
    assert patchkit.status(pipe) == {
        "target": "WanPipeline",
        "patched": False,
        "part_of": None,
        "recipes": [],
        "drift": [],
        "foreign": [],
    }
    with patchkit.apply(pipe, Scale(layers="0")):
        status = patchkit.status(pipe)
    assert status["patched"]
    assert status["recipes"] == [
        {
            "recipe": "toy-scale",
            "options": {"layers": "0"},
            "enabled": True,
            "sites": ["transformer.blocks.0.attn1", "transformer.blocks.0.attn2"],
        }
    ]
    json.dumps(status)


def test_report(pipe: Any) -> None:
    with patchkit.apply(pipe, [Replace(layers="0"), Scale(layers="1", targets=["attn1"])]) as patch:
        assert "nothing ran yet" in str(patch.report())
        tiny.run(ENTRY, pipe)
        report = patch.report()
    json.dumps(report.to_dict())
    replace, scale = report["recipes"]
    assert replace["sites"] == 2
    assert replace["calls"] == 2 * 2 * 2
    assert replace["counts"] == {"own": 8}
    assert scale["left"] == {"layer not selected": 1, "not in targets": 2} or sum(scale["left"].values()) == 3
    rows = [(r["site"], r["branch"], r["layer"], r["kind"], r["calls"]) for r in scale["rows"]]
    assert rows == [("blocks.1.attn1", b, 1, "self", 2) for b in ("cond", "uncond")]
    text = str(report)
    for part in ("patch on WanPipeline", "toy-replace: 2 sites, 8 calls", "own: 8", "transformer.blocks.1.attn1"):
        assert part in text


def test_a_recipe_that_returns_the_wrong_shape(pipe: Any) -> None:
    from dataclasses import dataclass

    @patchkit.recipe("toy-short")
    @dataclass(frozen=True)
    class Short(Identity):
        def attend(self, call: Any, next: Any) -> Any:
            return next(call)[:, :, 1:]

    with patchkit.apply(pipe, Short()), pytest.raises(patchkit.PatchkitError, match="'toy-short' returned") as error:
        tiny.run(ENTRY, pipe)
    assert "transformer.blocks.0.attn1" in str(error.value)
    assert "(B, H, Nq, D)" in str(error.value)


def test_a_shallow_copy_of_a_pipeline(pipe: Any) -> None:
    """It shares the patched transformer, as any shallow copy shares it; its own call is the original's."""
    watch = Watch()
    with patchkit.apply(pipe, watch):
        twin = copy.copy(pipe)
        assert type(twin).__mro__[0] is type(ENTRY.build())
        with pytest.raises(patchkit.Conflict, match="already patched"):
            patchkit.apply(twin, Identity())
