"""Evaluations are counted whoever makes them, and nothing of the counting stays behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import tiny
import torch

import patchkit
from patchkit.evaluation import counting
from patchkit.recipe_base import Recipe

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Again(Recipe):
    """Calls the model a second time: through the chain, or past it."""

    past: bool = False

    name: ClassVar[str] = "again"

    def denoise(self, call: Any, next: Callable[[Any], Any]) -> Any:
        first = next(call)
        call.module(*call.args, **call.kwargs) if self.past else next(call)
        return first


def own(module):
    """What a module itself holds; the weights by identity."""
    return {
        name: dict(value) if isinstance(value, dict) else value
        for name, value in vars(module).items()
        if name not in ("_parameters", "_buffers", "_modules")
    }


@pytest.mark.parametrize(("name", "component"), [("cogvideox", "transformer"), ("sd15", "unet")])
def test_unpatched(name, component):
    entry = tiny.PIPELINES[name]
    pipe = entry.build()
    module = getattr(pipe, component)
    plain = tiny.run(entry, pipe)
    before = own(module)
    steps = len(pipe.scheduler.timesteps)
    with counting.counting(pipe) as found:
        assert torch.equal(tiny.run(entry, pipe), plain)
    assert found.to_dict() == {"calls": steps, "samples": 2 * steps}
    assert own(module) == before
    assert type(module).__name__ == type(module).__qualname__
    tiny.run(entry, pipe)
    assert found.calls == {component: steps}


@pytest.mark.parametrize("past", [False, True])
def test_patched(past):
    entry = tiny.PIPELINES["cogvideox"]
    pipe = entry.build()
    with counting.counting(pipe) as found, patchkit.apply(pipe, Again(past=past)):
        tiny.run(entry, pipe)
    assert found.to_dict()["calls"] == 2 * len(pipe.scheduler.timesteps)
    assert not pipe.transformer._forward_pre_hooks


def test_guidance_as_two_calls():
    """Wan calls its transformer once for each half of the guidance."""
    entry = tiny.PIPELINES["wan21"]
    pipe = entry.build()
    with counting.counting(pipe) as found:
        tiny.run(entry, pipe)
    steps = len(pipe.scheduler.timesteps)
    assert found.to_dict() == {"calls": 2 * steps, "samples": 2 * steps}


def test_hooks_go_when_the_run_fails():
    pipe = tiny.PIPELINES["cogvideox"].build()

    def fail():
        with counting.counting(pipe):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not pipe.transformer._forward_pre_hooks


def test_a_language_model():
    model = tiny.MODELS["llama"].build()
    with counting.counting(model) as found:
        model.generate(torch.tensor([[1, 5, 6]]), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert found.to_dict() == {"calls": 4, "samples": 4}


def test_memory_is_seen_each_time():
    """An earlier, higher peak must not hide a later one, nor memory that was freed and is used again."""

    def grow(size):
        with counting.peak_memory("cpu") as peak:
            torch.ones(size * MIB // 4).sum()
        return peak

    first, second, third = grow(64), grow(32), grow(32)
    if first.bytes is None:
        pytest.skip(first.meaning)
    for peak, size in ((first, 64), (second, 32), (third, 32)):
        assert peak.bytes == pytest.approx(size * MIB, rel=0.15)
        assert peak.meaning == counting.ON_CPU


def test_memory_that_cannot_be_measured_is_no_zero(monkeypatch, tmp_path):
    monkeypatch.setattr(counting, "_CLEAR", tmp_path / "no" / "file")
    with counting.peak_memory("cpu") as peak:
        pass
    assert (peak.bytes, peak.meaning) == (None, counting.UNKNOWN)
