"""What cannot stand together is refused by name, and nothing is changed; the rest stands in the order asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import tiny
import torch
from fingerprint import assert_same, fingerprint
from mechanism.toys import Identity, Replace, ReplaceToo, Scale, Watch
from torch import Tensor

import patchkit
from patchkit import Recipe, recipe
from patchkit.context import AttentionCall


@pytest.fixture
def pipe() -> Any:
    return tiny.PIPELINES["wan21"].build()


OVERLAPPING: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"layers": "0"}, {}),
    ({"layers": "0-"}, {"targets": ["1.attn1"]}),
    ({"steps": (0.0, 0.5)}, {"steps": (0.4, 1.0)}),
    ({"steps": (0, 3)}, {"steps": (2, 5)}),
    ({"steps": (0, 3)}, {"steps": (0.9, 1.0)}),  # in different units: nobody knows, so taken to overlap
    ({"steps": (0.9, 1.0)}, {}),
]
DISJOINT: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"layers": "0"}, {"layers": "1"}),
    ({"targets": ["attn1"]}, {"exclude": ["attn1"]}),
    ({"steps": (0.0, 0.5)}, {"steps": (0.5, 1.0)}),
    ({"steps": (0, 1)}, {"steps": (1, 9)}),
]


@pytest.mark.parametrize(("a", "b"), OVERLAPPING, ids=str)
@pytest.mark.parametrize("together", [True, False])
def test_two_that_replace_the_same(pipe: Any, a: dict[str, Any], b: dict[str, Any], together: bool) -> None:
    first = None if together else patchkit.apply(pipe, Replace(**a))
    before = fingerprint(pipe)
    with pytest.raises(patchkit.Conflict) as error:
        patchkit.apply(pipe, [Replace(**a), ReplaceToo(**b)] if together else ReplaceToo(**b))
    assert_same(before, fingerprint(pipe))
    for name in ("'toy-replace'", "'toy-replace-too'", "transformer.blocks.", "WanPipeline"):
        assert name in str(error.value)
    recipes = [r["recipe"] for r in patchkit.status(pipe)["recipes"]]
    assert recipes == ([] if together else ["toy-replace"])
    if first is not None:
        first.remove()


@pytest.mark.parametrize(("a", "b"), DISJOINT, ids=str)
def test_two_that_replace_different_layers_or_steps(pipe: Any, a: dict[str, Any], b: dict[str, Any]) -> None:
    entry = tiny.PIPELINES["wan21"]
    plain = tiny.run(entry, pipe)
    with patchkit.apply(pipe, [Replace(**a), ReplaceToo(**b)]) as patch:
        torch.testing.assert_close(tiny.run(entry, pipe), plain, atol=1e-4, rtol=1e-4)
        counts = [r["counts"]["own"] for r in patch.report()["recipes"]]
    assert sum(counts) == 16, "every op is replaced once"


def test_a_declared_conflict(pipe: Any) -> None:
    @recipe("toy-loner")
    @dataclass(frozen=True)
    class Loner(Identity):
        conflicts = ("toy-scale",)

    for order in ([Loner(), Scale()], [Scale(), Loner()]):
        with pytest.raises(
            patchkit.Conflict, match=r"'toy-(loner|scale)' and 'toy-(loner|scale)' do not work together"
        ):
            patchkit.apply(pipe, order)
    assert not patchkit.status(pipe)["patched"]


def ordering(name: str, log: list[str], **declared: Any) -> Recipe:
    """A recipe that writes its name down when it is called."""

    def attend(self: Any, call: AttentionCall, next: Callable[[AttentionCall], Tensor]) -> Tensor:
        log.append(name)
        return next(call)

    cls = type(name, (Recipe,), {"attend": attend, "__module__": __name__, **declared})
    made: Recipe = recipe(name)(dataclass(frozen=True)(cls))(layers="0", targets=["attn1"])
    return made


CASES: list[tuple[dict[str, dict[str, Any]], list[str]]] = [
    ({"a": {}, "b": {}, "c": {}}, ["a", "b", "c"]),
    ({"a": {}, "b": {"before": ("a",)}}, ["b", "a"]),
    ({"a": {"after": ("b",)}, "b": {}}, ["b", "a"]),
    ({"a": {"after": ("c",)}, "b": {"before": ("a",)}, "c": {"after": ("b",)}}, ["b", "c", "a"]),
    ({"a": {"effect": "replaces"}, "b": {}}, ["b", "a"]),
    ({"a": {"before": ("absent",), "after": ("absent",)}, "b": {}}, ["a", "b"]),
]


@pytest.mark.parametrize(("declared", "order"), CASES, ids=str)
@pytest.mark.parametrize("together", [True, False])
def test_order(pipe: Any, declared: dict[str, dict[str, Any]], order: list[str], together: bool) -> None:
    log: list[str] = []
    recipes = [ordering(name, log, **more) for name, more in declared.items()]
    assert patchkit.plan(pipe, recipes).order == order
    for part in [recipes] if together else [[r] for r in recipes]:
        patchkit.apply(pipe, part)
    tiny.run(tiny.PIPELINES["wan21"], pipe, steps=1)
    assert log[: len(order)] == order
    assert [r["recipe"] for r in patchkit.status(pipe)["recipes"]] == order


def test_a_cycle(pipe: Any) -> None:
    recipes = [ordering("a", [], before=("b",)), ordering("b", [], before=("a",))]
    before = fingerprint(pipe)
    plan = patchkit.plan(pipe, recipes)
    assert "'a', 'b'" in plan.problems[0]
    with pytest.raises(patchkit.Conflict, match="'a', 'b' each ask to stand outside"):
        plan.apply()
    assert_same(before, fingerprint(pipe))
    with patchkit.apply(pipe, recipes[0]) as patch:
        with pytest.raises(patchkit.Conflict):
            patchkit.apply(pipe, recipes[1])
        assert patch.active


# --- one model, two holders


def test_one_transformer_through_two_pipelines() -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    one = tiny.PIPELINES["sd15"].build()
    two = StableDiffusionImg2ImgPipeline.from_pipe(one)
    with patchkit.apply(one, Scale()):
        three = StableDiffusionImg2ImgPipeline.from_pipe(one)
        assert type(three) is StableDiffusionImg2ImgPipeline
        before = fingerprint(two)
        for other in (two, three, one.unet):
            for attempt in (patchkit.apply, patchkit.plan):
                with pytest.raises(patchkit.Conflict, match="already patched through StableDiffusionPipeline"):
                    attempt(other, Identity())
        assert_same(before, fingerprint(two))
        assert patchkit.status(one.unet)["part_of"] == "StableDiffusionPipeline"
        assert not patchkit.status(one.unet)["patched"]
        with pytest.raises(patchkit.Conflict, match="as a part of a StableDiffusionPipeline"):
            patchkit.remove(one.unet)
        assert patchkit.status(one)["patched"]
    with patchkit.apply(two, Identity()), pytest.raises(patchkit.Conflict, match="Img2Img"):
        patchkit.apply(one, Identity())
    with patchkit.apply(one.unet, Identity()), pytest.raises(patchkit.Conflict, match="UNet2DConditionModel"):
        patchkit.apply(one, Identity())
    patchkit.apply(one, Identity()).remove()


def test_a_part_of_a_language_model_patched_by_itself() -> None:
    model = tiny.MODELS["llama"].build()
    with patchkit.apply(model.model, Identity()), pytest.raises(patchkit.Conflict, match="already patched"):
        patchkit.apply(model, Identity())
    patchkit.apply(model, Identity()).remove()


# --- the same patch from several plans


def test_two_plans_made_before_either_is_applied(pipe: Any) -> None:
    entry = tiny.PIPELINES["wan21"]
    tiny.run(entry, pipe)
    before = fingerprint(pipe)
    watches = Watch(), Watch()
    plans = [patchkit.plan(pipe, watch) for watch in watches]
    patches = [plan.apply() for plan in plans]
    tiny.run(entry, pipe)
    assert len(watches[0].seen) == len(watches[1].seen) == 16
    for patch in patches:
        patch.remove()
    assert_same(before, fingerprint(pipe))


def test_a_plan_applied_again_after_removal(pipe: Any) -> None:
    entry = tiny.PIPELINES["wan21"]
    plain = tiny.run(entry, pipe)
    plan = patchkit.plan(pipe, Scale())
    results = []
    for _ in range(2):
        with plan.apply():
            results.append(tiny.run(entry, pipe))
    assert torch.equal(*results)
    assert not torch.equal(results[0], plain)


def test_a_plan_that_has_become_impossible(pipe: Any) -> None:
    plan = patchkit.plan(pipe, ReplaceToo())
    with patchkit.apply(pipe, Replace()), pytest.raises(patchkit.Conflict, match="both replace"):
        plan.apply()
