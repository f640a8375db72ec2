"""Recipes around transformer blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import tiny
import torch
from fingerprint import assert_same, diff, fingerprint
from mechanism.toys import Counter, Identity, Scale
from torch import Tensor

import patchkit
from patchkit import Recipe, recipe
from patchkit.context import AttentionCall, BlockCall, DenoiseCall, Moment


@recipe("toy-blocks")
@dataclass(frozen=True)
class Passing(Recipe):
    """Remembers which blocks come by, and when."""

    def validate(self) -> None:
        object.__setattr__(self, "seen", [])

    seen: ClassVar[list[tuple[str, str, int, Moment]]]

    def attend(self, call: AttentionCall, next: Callable[[AttentionCall], Tensor]) -> Tensor:
        assert call.shared["layer"] == call.site.layer, "the op runs inside its block"
        return next(call)

    def block(self, call: BlockCall, next: Callable[[BlockCall], Any]) -> Any:
        self.seen.append((call.block.component, call.block.name, call.layer, call.moment))
        call.shared["layer"] = call.layer
        call.ledger.count("passed")
        return next(call)


@recipe("toy-replay")
@dataclass(frozen=True)
class Replay(Recipe):
    """Runs the denoiser a second time, in which blocks give back what they gave the first time."""

    def block(self, call: BlockCall, next: Callable[[BlockCall], Any]) -> Any:
        kept = call.shared.setdefault("kept", {})
        if call.branch.endswith("again"):
            return kept[call.block.name]
        kept[call.block.name] = next(call)
        return kept[call.block.name]

    def denoise(self, call: DenoiseCall, next: Callable[[DenoiseCall], Any]) -> Any:
        next(call)
        return next(call.replace(moment=Moment(call.step, call.total, f"{call.branch}-again")))


@pytest.mark.parametrize("name", tiny.PIPELINES)
def test_every_block_comes_by_once_a_forward_in_order(name: str) -> None:
    entry = tiny.PIPELINES[name]
    pipe = entry.build()
    plain, before = tiny.run(entry, pipe), fingerprint(pipe)
    passing = Passing()
    with patchkit.apply(pipe, passing) as patch:
        assert torch.equal(tiny.run(entry, pipe), plain)
        assert diff(before, fingerprint(pipe))
        seen = passing.seen
        counts = {c: len({s.layer for s in patch._bounds[0].sites if s.component == c}) for c, *_ in seen}
        forwards: list[list[int]] = []
        for component, _, layer, moment in seen:
            if layer == 0:
                forwards.append([])
            forwards[-1].append(layer)
            assert moment.total == 2
            assert len(forwards[-1]) <= counts[component]
        assert all(layers == list(range(len(layers))) for layers in forwards)
        per_step = {"batched": 1, "two_calls": 2, "one_call": 1}[entry.expected.cfg]
        assert len(forwards) == 2 * per_step
        assert [m.step for *_, m in seen] == sorted(m.step for *_, m in seen)
        assert sum(patch.report()["recipes"][0]["counts"].values()) == len(seen)
    assert torch.equal(tiny.run(entry, pipe), plain)
    assert_same(before, fingerprint(pipe))


@pytest.mark.parametrize("name", [n for n in tiny.MODELS if n != "vit"])
def test_every_layer_of_a_language_model_comes_by(name: str) -> None:
    entry = tiny.MODELS[name]
    model = entry.build()
    patchkit.apply(model, Identity()).remove()  # the one registry entry that stays
    plain, before = tiny.forward(entry, model), fingerprint(model)
    passing = Passing()
    with patchkit.apply(model, passing):
        assert torch.equal(tiny.forward(entry, model), plain)
        by_component: dict[str, list[int]] = {}
        for component, _, layer, _ in passing.seen:
            by_component.setdefault(component, []).append(layer)
        for layers in by_component.values():
            assert layers == sorted(layers)
            assert set(layers) == set(range(max(layers) + 1))
    assert torch.equal(tiny.forward(entry, model), plain)
    assert_same(before, fingerprint(model))


@pytest.mark.parametrize("name", tiny.PIPELINES)
def test_a_block_need_not_run(name: str) -> None:
    """The second pass computes no attention in any block, and ends where the first did."""
    entry = tiny.PIPELINES[name]
    pipe = entry.build()
    plain = tiny.run(entry, pipe)
    counter = Counter()
    with patchkit.apply(pipe, [Replay(), counter]):
        assert torch.equal(tiny.run(entry, pipe), plain)
    assert counter.counts
    assert not any(branch.endswith("again") for _, branch, *_ in counter.counts)


def test_patches_with_and_without_blocks_leave_in_any_order() -> None:
    entry = tiny.PIPELINES["sd3"]
    pipe = entry.build()
    plain, before = tiny.run(entry, pipe), fingerprint(pipe)
    for first in (0, 1):
        patches = [patchkit.apply(pipe, r) for r in (Passing(), Scale(factor=1.0))]
        patches.pop(first).remove()
        assert torch.equal(tiny.run(entry, pipe), plain)
        patches[0].remove()
        assert_same(before, fingerprint(pipe))


@pytest.mark.parametrize("others", [False, True], ids=["alone", "beside another patch"])
def test_a_failure_at_any_block_leaves_nothing(others: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from patchkit.journal import Journal

    pipe = tiny.PIPELINES["flux"].build()
    other = patchkit.apply(pipe, Identity()) if others else None
    before = fingerprint(pipe)
    put = Journal.set
    for stop in (1, 2, 4):
        blocks = 0

        def fail(self: Any, owner: object, obj: Any, name: str, value: Any, stop: int = stop) -> None:
            nonlocal blocks
            if name == "__class__" and "Block" in type(obj).__name__:
                blocks += 1
                if blocks == stop:
                    raise RuntimeError("stopped")
            put(self, owner, obj, name, value)

        with monkeypatch.context() as patch:
            patch.setattr(Journal, "set", fail)
            with pytest.raises(RuntimeError, match="stopped"):
                patchkit.apply(pipe, Passing())
        # the chains of the other patch are put together again
        assert [line for line in diff(before, fingerprint(pipe)) if "_patchkit_site.chain" not in line] == []
    if other is not None:
        other.remove()


@pytest.mark.parametrize("name", ["wan21", "flux"])
def test_blocks_compiled_by_themselves(name: str) -> None:
    """The recipe stands around the compiled block; blocks of one class still share their graph."""
    entry = tiny.PIPELINES[name]
    pipe = entry.build()
    passing = Passing()
    with patchkit.apply(pipe, passing) as patch:
        eager = tiny.run(entry, pipe)
        plainly = list(passing.seen)
        passing.seen.clear()
        pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
        torch.testing.assert_close(tiny.run(entry, pipe), eager, atol=1e-5, rtol=1e-5)
        assert passing.seen == plainly
        assert patch.report()["drift"] == []


def test_a_model_compiled_whole_is_named() -> None:
    entry = tiny.PIPELINES["wan21"]
    pipe = entry.build()
    plain = tiny.run(entry, pipe)
    pipe.transformer.compile(backend="eager")
    with patchkit.apply(pipe, Replay()) as patch:
        torch.testing.assert_close(tiny.run(entry, pipe), plain, atol=1e-5, rtol=1e-5)  # every block ran both times
        assert any("blocks of a model that is compiled whole" in what for what in patch.report()["drift"])


def test_what_is_known_of_blocks_and_their_attention() -> None:
    from patchkit.adapters import adapter_for
    from patchkit.blocks import blocks_of

    def of(name: str) -> tuple[Any, list[Any], list[Any]]:
        pipe = tiny.PIPELINES[name].build()
        adapter = adapter_for(pipe)
        sites = adapter.sites()
        return pipe, sites, blocks_of(adapter, sites)

    pipe, sites, blocks = of("flux")
    assert [b.stack for b in blocks] == ["transformer_blocks"] * 2 + ["single_transformer_blocks"] * 2
    assert all(b.chained and b.must_run is None for b in blocks)
    pipe.transformer.enable_group_offload(torch.device("cpu"), torch.device("cpu"), "block_level", 1)
    assert all("group offloading" in b.must_run for b in blocks)
    assert {s.order for s in sites} == {0}
    assert not any(b.chained for b in of("sd15")[2])
    assert [s.order for s in of("sd35")[1]][:2] == [0, 1], "attn, then attn2 of the same block"
