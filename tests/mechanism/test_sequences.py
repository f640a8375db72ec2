"""What recipes are told of a language model's tokens and sequences, and of what enters its blocks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import tiny
import torch
from fingerprint import assert_same, fingerprint
from tiny.vlms import VLMS
from torch import Tensor

import patchkit
from patchkit import InvalidOption, Recipe, recipe
from patchkit.context import AttentionCall, BlockInput
from patchkit.selection import Indices


@recipe("toy-look")
@dataclass(frozen=True)
class Look(Recipe):
    """Remembers what enters blocks, and what it is told of the keys; counts the calls of a sequence."""

    presets: ClassVar[dict[str, dict[str, Any]]] = {"second": {"layers": "1"}}
    entered: ClassVar[list[tuple[int, int | None, tuple[int, ...]]]]
    keys: ClassVar[list[tuple[Any, ...]]]

    def validate(self) -> None:
        for name in ("entered", "keys"):
            object.__setattr__(self, name, [])

    def prepare(self, target: Any, sites: list[Any]) -> str:
        return "looked"

    def enter(self, call: BlockInput) -> None:
        assert call.prepared == "looked"
        call.shared["count"] = call.shared.get("count", 0) + 1
        self.entered.append((call.layer, call.past, tuple(call.hidden.shape)))

    def accepts(self, site: Any) -> str | None:
        return "sees pictures" if site.component == "vision" else None

    def attend(self, call: AttentionCall, next: Callable[[AttentionCall], Tensor]) -> Tensor:
        assert call.prepared == "looked"
        told = [None if x is None else x.int().tolist() for x in (call.visual, call.real)]
        self.keys.append((*told, call.first, call.dropped, call.shared["count"]))
        return next(call)


def one_row(length: int = 6) -> Tensor:
    return torch.randint(3, 380, (1, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_what_enters_blocks_and_what_keys_are() -> None:
    model, look = tiny.MODELS["llama"].build(3), Look(layers="1")
    before = fingerprint(model)
    with patchkit.apply(model, look):
        out = model(input_ids=one_row(), attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1]]), use_cache=True)
        model(input_ids=one_row(1), past_key_values=out.past_key_values, attention_mask=torch.tensor([[0] + [1] * 6]))
    assert look.entered == [(1, 0, (1, 6, 32)), (1, 6, (1, 1, 32))]
    assert [k[1:] for k in look.keys] == [([[0, 1, 1, 1, 1, 1]], 0, 0, 1), ([[0, 1, 1, 1, 1, 1, 1]], 6, 0, 2)]
    assert_same(before, fingerprint(model))


@torch.no_grad()
def test_each_cache_has_its_own_state() -> None:
    model, look = tiny.MODELS["llama"].build(1), Look()
    with patchkit.apply(model, look):
        caches = [model(input_ids=one_row(n), use_cache=True).past_key_values for n in (5, 7)]
        for cache in (caches[0], caches[1], caches[0]):
            model(input_ids=one_row(1), past_key_values=cache)
        copied = copy.deepcopy(caches[0])
        model(input_ids=one_row(1), past_key_values=copied)
    assert [k[4] for k in look.keys] == [1, 1, 2, 2, 3, 1], "what a copy holds, nobody has seen"
    assert [k[2] for k in look.keys] == [0, 0, 5, 7, 6, 7]


@torch.no_grad()
def test_a_cache_that_is_cut_back() -> None:
    entry, look = VLMS["llava"], Look(layers="0")
    model = entry.build(1)
    batch = {k: v[:1] for k, v in entry.inputs(model).items() if k != "pixel_values"}
    with patchkit.apply(model, look):
        out = model(**batch, pixel_values=entry.inputs(model)["pixel_values"][:2], use_cache=True)
        cache = out.past_key_values
        cache.crop(10 - cache.get_seq_length())
        model(input_ids=one_row(3), past_key_values=cache)
    assert look.keys[1][0] == [look.keys[0][0][0][:10] + [0] * 3]
    assert look.keys[1][2] == 10


@torch.no_grad()
def test_inside_a_model_that_is_compiled_whole() -> None:
    torch._dynamo.reset()
    model, look = tiny.MODELS["llama"].build(2), Look()
    compiled = torch.compile(model, backend="eager")
    with patchkit.apply(compiled, look) as patch:
        compiled(input_ids=one_row(), use_cache=False)
        assert look.entered == [(0, 0, (1, 6, 32)), (1, 0, (1, 6, 32))]
        assert not patch.report().cautions()
    torch._dynamo.reset()


def test_gradients_go_through_what_is_only_looked_at() -> None:
    model = tiny.MODELS["llama"].build(1)
    rows = one_row()

    def gradient() -> Tensor:
        model.zero_grad()
        model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
        return model.model.embed_tokens.weight.grad.clone()

    plain = gradient()
    with patchkit.apply(model, Look()):
        assert torch.equal(gradient(), plain)


def test_presets_in_a_call_and_in_a_file(tmp_path: Any) -> None:
    from patchkit.recipe_files.files import load_recipes

    assert Look.preset("second").layers == "1"
    assert Look.build({"preset": "second", "layers": "0"}).layers == "0"
    path = tmp_path / "look.yaml"
    path.write_text("version: 1\nmodel: zoo/video\nrecipes:\n  - toy-look: {preset: second}\n")
    assert load_recipes(path)[0].layers == "1"
    assert Look.schema()["properties"]["preset"] == {"enum": ["second"]}
    with pytest.raises(InvalidOption, match="no preset 'secnd'"):
        Look.build({"preset": "secnd"})
    with pytest.raises(InvalidOption, match="no option 'preset'"):
        tiny_recipe().build({"preset": "second"})


def tiny_recipe() -> type[Recipe]:
    from mechanism.toys import Identity

    return Identity


@pytest.mark.parametrize(
    ("text", "count", "wanted"),
    [("2:-1", 6, [2, 3, 4]), ("2:", 4, [2, 3]), (":2", 4, [0, 1]), ("1:3,-1", 5, [1, 2, 4]), ("2:-1", 3, [])],
)
def test_slices_of_layers(text: str, count: int, wanted: list[int]) -> None:
    assert sorted(Indices.parse(text, "here").resolve(count)) == wanted


@pytest.mark.parametrize("text", ["3:3", "3:1", "2:0"])
def test_empty_slices(text: str) -> None:
    with pytest.raises(InvalidOption, match="is empty"):
        Indices.parse(text, "here")


def test_a_slice_that_selects_nothing_is_named_as_written() -> None:
    assert Indices.parse("2:-1", "here").beyond(3) == ["2:-1"]
