"""The selection grammar, and options that are wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import tiny
from mechanism.toys import Identity, Watch
from pydantic import Field
from torch import Tensor

import patchkit
from patchkit import Recipe, recipe
from patchkit.context import AttentionCall
from patchkit.selection import Indices, StepWindow


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.PIPELINES["wan21"].build(layers=8)


def layers_of(pipe: Any, **options: Any) -> list[int]:
    matched = patchkit.plan(pipe, Identity(**options)).selections[0].matched
    return sorted({site.layer for site in matched})


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        (None, range(8)),
        ("0", [0]),
        (3, [3]),
        ([1, 3], [1, 3]),
        ("0,5-6,-1", [0, 5, 6, 7]),
        ("5-", [5, 6, 7]),
        ("-3-", [5, 6, 7]),
        ("-3--2", [5, 6]),
        ("2--2", [2, 3, 4, 5, 6]),
        (" 1 , 2 - 3 ", [1, 2, 3]),
        (-1, [7]),
        ("6-20", [6, 7]),
    ],
)
def test_layers(pipe: Any, text: Any, chosen: Any) -> None:
    assert layers_of(pipe, layers=text) == list(chosen)


def test_layers_count_in_execution_order() -> None:
    unet = tiny.PIPELINES["sd15"].build()
    (selection,) = patchkit.plan(unet, Identity(layers="2")).selections
    assert {site.name.split(".")[0] for site in selection.matched} == {"mid_block"}


@pytest.mark.parametrize("text", ["a", "1,", "1-2-3", "5-2", "", "1.5"])
def test_layers_that_cannot_be_read(text: str) -> None:
    with pytest.raises(patchkit.InvalidOption, match="layers"):
        Identity(layers=text)


@pytest.mark.parametrize(
    ("text", "named"), [("8", "8"), ("0,9", "9"), ("-9", "-9"), ("10-12", "10-12"), ("0,8-", "8-")]
)
def test_layers_out_of_range(pipe: Any, text: str, named: str) -> None:
    with pytest.raises(patchkit.InvalidOption) as error:
        patchkit.apply(pipe, Identity(layers=text))
    message = str(error.value)
    assert f"{named} selects none of the 8 blocks" in message
    assert "0 to 7" in message
    assert "'toy-identity'" in message
    assert "WanPipeline" in message


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"targets": ["attn1"]}, 8),
        ({"targets": ["attn1", "0.attn2"]}, 9),
        ({"targets": ["ttn1"]}, None),
        ({"targets": ["1"]}, None),
        ({"targets": "attn1"}, None),
        ({"targets": r".*\.attn1"}, 8),
        ({"targets": r"transformer\.blocks\.[01]\.attn2"}, 2),
        ({"targets": r"blocks\.[01]\.attn2"}, 2),
        ({"exclude": ["attn2"]}, 8),
        ({"exclude": r".*attn2", "targets": ["attn2"]}, None),
        ({"targets": ["attn1"], "exclude": ["3.attn1"], "layers": "2-4"}, 2),
    ],
    ids=str,
)
def test_targets_and_exclude(pipe: Any, options: dict[str, Any], count: int | None) -> None:
    if count is None:
        with pytest.raises(patchkit.NothingMatched, match="no attention site is left to patch") as error:
            patchkit.apply(pipe, Identity(**options))
        assert "16 x" in str(error.value) or "8 x" in str(error.value)
    else:
        assert len(patchkit.plan(pipe, Identity(**options)).selections[0].matched) == count


def test_a_regular_expression_that_is_none(pipe: Any) -> None:
    with pytest.raises(patchkit.InvalidOption, match="not a regular expression"):
        patchkit.apply(pipe, Identity(targets="(("))


@pytest.mark.parametrize(
    ("steps", "seen"),
    [
        ((0.0, 0.5), [0, 1]),
        ((0.5, 1.0), [2, 3]),
        ((0.2, 1), [1, 2, 3]),
        ((0, 0.5), [0, 1]),
        ((1, 3), [1, 2]),
        ([3, 99], [3]),
        ((0.3, 0.3001), []),
    ],
    ids=str,
)
def test_steps(steps: Any, seen: list[int]) -> None:
    entry = tiny.PIPELINES["wan21"]
    small, watch = entry.build(), Watch(steps=steps)
    with patchkit.apply(small, watch):
        tiny.run(entry, small, steps=4)
    assert sorted({s.step for s in watch.seen}) == seen
    assert sorted({m.step for _, m in watch.denoised}) == seen


@pytest.mark.parametrize(
    "steps", [(0.5, 0.2), (3, 3), (-1, 2), (0.0, 1.5), (0.1,), "0.1", (True, 3), (1, 2, 3)], ids=str
)
def test_steps_that_are_wrong(steps: Any) -> None:
    with pytest.raises(patchkit.InvalidOption, match="steps"):
        Identity(steps=steps)


def test_windows() -> None:
    always = StepWindow.parse(None, "")
    assert always.contains(None, None)
    part = StepWindow.parse((0.0, 1.0), "")
    assert not part.contains(None, None)
    assert part.contains(0, 4)
    assert part.contains(3, 4)
    assert Indices.parse("-1", "").resolve(0) == frozenset()


def test_fractions_of_a_language_model(pipe: Any) -> None:
    model = tiny.MODELS["llama"].build()
    with pytest.raises(patchkit.InvalidOption, match="no known length"):
        patchkit.apply(model, Identity(steps=(0.0, 0.5)))
    entry, watch = tiny.MODELS["llama"], Watch(steps=(1, 3))
    with patchkit.apply(model, watch):
        tiny.generate(entry, model, new_tokens=5)
    assert sorted({s.step for s in watch.seen}) == [1, 2]


# --- options


@recipe("toy-options")
@dataclass(frozen=True)
class Options(Recipe):
    uses_heads = True

    density: Annotated[float, Field(gt=0, le=1)] = 0.5
    count: int = 1
    mode: str = "a"
    quick: bool = False

    def attend(self, call: AttentionCall, next: Callable[[AttentionCall], Tensor]) -> Tensor:
        return next(call)


@pytest.fixture(autouse=True)
def _registered() -> None:
    from patchkit import registry

    registry._recipes["toy-options"] = Options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"densty": 0.2}, ("no option 'densty'", "did you mean 'density'?")),
        ({"zzz": 1}, ("no option 'zzz'", "known: ")),
        ({"density": 2.0}, ("density", "less than or equal to 1")),
        ({"density": 0}, ("density", "greater than 0")),
        ({"density": "much"}, ("'much'", "density", "number")),
        ({"density": True}, ("True", "density", "float")),
        ({"count": False}, ("False", "count", "int")),
        ({"count": 1.5}, ("1.5", "count")),
        ({"count": [1]}, ("count",)),
        ({"mode": 3}, ("mode",)),
        ({"quick": "perhaps"}, ("quick",)),
        ({"layers": True}, ("layers",)),
        ({"layers": [0, True]}, ("layers",)),
        ({"heads": "x"}, ("heads",)),
    ],
    ids=str,
)
def test_wrong_options(pipe: Any, options: dict[str, Any], words: tuple[str, ...]) -> None:
    for attempt in (patchkit.apply, patchkit.plan):
        with pytest.raises(patchkit.InvalidOption) as error:
            attempt(pipe, "toy-options", **options)
        for word in ("toy-options", *words):
            assert word in str(error.value)
    assert not patchkit.status(pipe)["patched"]


def test_heads(pipe: Any) -> None:
    with pytest.raises(patchkit.InvalidOption, match="does not work per head"):
        Identity(heads="0")
    with pytest.raises(patchkit.InvalidOption, match="2 selects none of the 2 heads"):
        patchkit.apply(pipe, Options(heads="2"))
    with patchkit.apply(pipe, Options(heads="-1")) as patch:
        (bound,) = patch._live().bound
        assert bound.heads(bound.sites[0]) == {1}


def test_unknown_recipe_names_the_nearest(pipe: Any) -> None:
    with pytest.raises(patchkit.UnknownRecipe, match="did you mean 'toy-options'"):
        patchkit.apply(pipe, "toy-option")
