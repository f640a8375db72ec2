"""What a recipe hears of an attention module besides its op's inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from fingerprint import assert_same, fingerprint

import patchkit
from patchkit import registry
from patchkit.listening import has_query_norm, projection_name

heard: list[tuple[Any, Any, Any]] = []


@dataclasses.dataclass(frozen=True)
class Listener(patchkit.Recipe):
    def listens(self, site: Any) -> Any:
        return frozenset(("hidden", "queries"))

    def attend(self, call: Any, next: Any) -> Any:
        heard.append((call.hidden, call.queries, call.q))
        return next(call)


@pytest.fixture(autouse=True)
def _known() -> Iterator[None]:
    heard.clear()
    patchkit.recipe("toy-listener")(Listener)
    yield
    registry._recipes.pop("toy-listener", None)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "bert"])
def test_hidden_states_and_projected_queries(name: str) -> None:
    entry = tiny.MODELS[name]
    model = entry.build()
    patchkit.apply(model, "toy-listener").remove()  # transformers' registries keep our name from here on
    before, plain = fingerprint(model), tiny.forward(entry, model)
    with patchkit.apply(model, "toy-listener") as patch:
        sites = [site.module for site in patch._bounds[0].sites]
        assert torch.equal(tiny.forward(entry, model), plain)
        assert len(heard) == len(sites)
        for module, (hidden, queries, q) in zip(sites, heard, strict=True):
            projection = module.get_submodule(projection_name(module))
            expected = projection(hidden).view(*hidden.shape[:2], q.shape[1], -1).transpose(1, 2)
            assert torch.equal(queries, expected)
            same_length = torch.allclose(queries.norm(dim=-1), q.norm(dim=-1), rtol=1e-4)
            assert same_length is not has_query_norm(module)
    assert_same(before, fingerprint(model))


def test_gpt2_projects_all_at_once() -> None:
    entry = tiny.MODELS["gpt2"]
    model = entry.build()
    with patchkit.apply(model, "toy-listener"):
        tiny.forward(entry, model)
    assert all(hidden is not None and queries is None for hidden, queries, _ in heard)
