"""``plan``: says everything that ``apply`` would do, and does nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tiny
from fingerprint import assert_same, fingerprint
from mechanism.toys import Identity, Replace, Scale

import patchkit

ENTRY = tiny.PIPELINES["wan21"]


@pytest.fixture
def pipe() -> Any:
    return ENTRY.build()


def test_plan_leaves_no_trace(pipe: Any) -> None:
    tiny.run(ENTRY, pipe)
    before = fingerprint(pipe)
    plan = patchkit.plan(pipe, [Scale(), Replace(layers="0")], steps=10, tokens=1000)
    str(plan)
    json.dumps(plan.to_dict())
    assert_same(before, fingerprint(pipe))
    assert not patchkit.status(pipe)["patched"]


def test_plan_says_what_would_happen(pipe: Any) -> None:
    class Half(Replace):
        def attention_cost(self, tokens: int, total: int) -> float:
            return 0.5

    plan = patchkit.plan(pipe, [Half(layers="1"), Scale(exclude=["attn2"])], steps=10, tokens=4000)
    data = plan.to_dict()
    assert [len(r["matched"]) for r in data["recipes"]] == [2, 2]
    assert data["recipes"][1]["left"] == [
        {"site": f"transformer.blocks.{i}.attn2", "reason": "excluded"} for i in range(2)
    ]
    assert data["order"] == ["toy-scale", "toy-replace"]
    assert data["conflicts"] == []
    half, scale = data["predicted"]
    assert half["attention_flops"] == 0.5
    assert 0 < half["attention_share"] < scale["attention_share"] < 1
    share = half["attention_share"]
    assert half["speed_up"] == pytest.approx(1 / (1 - share / 2), abs=1e-3)
    assert scale["speed_up"] == 1
    text = str(plan)
    for part in (
        "plan for WanPipeline",
        "toy-scale: 2 of 4 sites",
        "left: 2 x excluded",
        "toy-scale > toy-replace",
        "predicted at 4000 tokens and 10 steps",
    ):
        assert part in text
    with plan.apply() as patch:
        tiny.run(ENTRY, pipe)
        assert [r["calls"] for r in patch.report()["recipes"]] == [8, 8]


def test_plan_takes_a_recipes_own_steps(pipe: Any) -> None:
    plan = patchkit.plan(pipe, "toy-scale", steps=(0.5, 1.0))
    assert plan.selections[0].recipe.steps == (0.5, 1.0)
    assert plan.steps == 50


def test_plan_names_conflicts_without_raising(pipe: Any) -> None:
    plan = patchkit.plan(pipe, [Replace(), "toy-replace-too"])
    assert "both replace" in plan.to_dict()["conflicts"][0]
    assert "CONFLICT" in str(plan)


def test_plan_of_what_is_patched_already(pipe: Any) -> None:
    with patchkit.apply(pipe, Scale()):
        plan = patchkit.plan(pipe, Identity())
        assert plan.order == ["toy-scale", "toy-identity"]
