"""After removal a target is what it was: every object, class, hook, registry, and the bits of its output."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import pytest
import tiny
import torch
from fingerprint import assert_same, diff, fingerprint
from mechanism.toys import Counter, Fail, Identity, Loudness, Scale, Twice, Watch

import patchkit
from patchkit.journal import Entry, Journal

PIPELINES = pytest.mark.parametrize("name", tiny.PIPELINES)
MODELS = pytest.mark.parametrize("name", tiny.MODELS)


def rehearsed(name: str) -> tuple[Any, Any, torch.Tensor, dict[str, Any]]:
    """A target that has run once, and what it is then."""
    if name in tiny.PIPELINES:
        entry: Any = tiny.PIPELINES[name]
        target = entry.build()
        output = tiny.run(entry, target)
    else:
        entry = tiny.MODELS[name]
        target = entry.build()
        patchkit.apply(target, Identity()).remove()  # the one registry entry that stays
        output = tiny.forward(entry, target)
    return entry, target, output, fingerprint(target)


def output_of(entry: Any, target: Any) -> torch.Tensor:
    return tiny.run(entry, target) if isinstance(entry, tiny.TinyPipeline) else tiny.forward(entry, target)


@pytest.mark.parametrize("name", [*tiny.PIPELINES, *tiny.MODELS])
def test_removal_is_exact(name: str) -> None:
    entry, target, plain, before = rehearsed(name)
    with patchkit.apply(target, [Scale(), Watch()]) as patch:
        assert not torch.equal(output_of(entry, target), plain)
        assert diff(before, fingerprint(target)), "the check would not notice a patch"
        assert patch.remove() == []
    assert torch.equal(output_of(entry, target), plain)
    assert_same(before, fingerprint(target))


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
@pytest.mark.parametrize("name", ["wan21", "sd15", "mochi", "llama"])
def test_patches_leave_in_any_order(name: str, order: tuple[int, ...]) -> None:
    entry, target, plain, before = rehearsed(name)
    layered = Scale(layers="1", factor=0.25)
    outer = Twice() if name == "llama" else Loudness()
    patches = [patchkit.apply(target, r) for r in (Scale(layers="0"), layered, outer)]
    for i in order:
        patches[i].remove()
        alone = [p for p in patches if p.active]
        assert len(patchkit.status(target)["recipes"]) == len(alone)
        output_of(entry, target)
    assert torch.equal(output_of(entry, target), plain)
    assert_same(before, fingerprint(target))


def test_a_patch_that_stays_works_as_if_alone() -> None:
    entry, pipe, plain, _ = rehearsed("wan21")
    with patchkit.apply(pipe, Scale(layers="1")):
        alone = tiny.run(entry, pipe)
    first = patchkit.apply(pipe, Scale(layers="0"))
    with patchkit.apply(pipe, Scale(layers="1")):
        both = tiny.run(entry, pipe)
        first.remove()
        assert torch.equal(tiny.run(entry, pipe), alone)
    assert not torch.equal(both, alone)
    assert torch.equal(tiny.run(entry, pipe), plain)


# --- faults while applying


class Stop(Exception):
    """Raised by the tests' journals."""


def failing(monkeypatch: pytest.MonkeyPatch, at: int, where: str) -> list[str]:
    """Let the ``at``-th write fail: ``before`` it is recorded, ``after`` that, or ``inside`` the write, half done."""
    written: list[str] = []
    record, put, act = Journal.record, Journal.set, Journal.do

    def counted(self: Journal, entry: Entry) -> None:
        written.append(entry.name)
        if len(written) == at and where == "before":
            raise Stop
        record(self, entry)
        if len(written) == at and where == "after":
            raise Stop

    def failing_set(self: Journal, *args: Any) -> None:
        put(self, *args)
        if len(written) == at and where == "inside":
            raise Stop

    def failing_do(self: Journal, owner: object, action: Any, take_back: Any, what: str) -> None:
        act(self, owner, action, take_back, what)
        if len(written) == at and where == "inside":
            raise Stop

    monkeypatch.setattr(Journal, "record", counted)
    monkeypatch.setattr(Journal, "set", failing_set)
    monkeypatch.setattr(Journal, "do", failing_do)
    return written


@pytest.mark.parametrize(
    ("name", "where"),
    [("wan22", "before"), ("wan22", "after"), ("wan22", "inside"), ("sd15", "after"), ("llava", "inside")],
)
def test_failure_at_any_write_changes_nothing(name: str, where: str) -> None:
    entry, target, plain, before = rehearsed(name)
    for at in itertools.count(1):
        with pytest.MonkeyPatch.context() as patched:
            written = failing(patched, at, where)
            try:
                patch = patchkit.apply(target, Scale())
            except Stop:
                assert len(written) == at
                assert not patchkit.status(target)["patched"]
                assert_same(before, fingerprint(target))
                continue
        break
    assert at > {"wan22": 11, "sd15": 16, "llava": 4}[name], "not every write was tried"
    assert not torch.equal(output_of(entry, target), plain)
    patch.remove()
    assert torch.equal(output_of(entry, target), plain)
    assert_same(before, fingerprint(target))


@pytest.mark.parametrize("where", ["before", "after", "inside"])
def test_failure_of_a_second_patch_leaves_the_first(where: str) -> None:
    entry, target, plain, before = rehearsed("wan21")
    first = patchkit.apply(target, Scale(layers="0"))
    alone = tiny.run(entry, target)
    between = fingerprint(target)
    for at in itertools.count(1):
        with pytest.MonkeyPatch.context() as patched:
            failing(patched, at, where)
            try:
                second = patchkit.apply(target, Scale(layers="1"))
            except Stop:
                # what lies behind a processor of ours may change, and chains are put together again
                assert [line for line in diff(between, fingerprint(target)) if "._patchkit_site." not in line] == []
                assert torch.equal(tiny.run(entry, target), alone)
                continue
        break
    assert at == 3, "layer 1 has two sites, and nothing else is new"
    second.remove()
    first.remove()
    assert torch.equal(tiny.run(entry, target), plain)
    assert_same(before, fingerprint(target))


# --- faults while running


def fail_at(pipe: Any, where: str) -> tuple[patchkit.Recipe, dict[str, Any], Any]:
    """A recipe, extra arguments of the call, and an undo, that make a run fail at ``where``."""
    if where in ("attend", "denoise", "run"):
        return Fail(level=where, at=1 if where == "run" else 3), {}, lambda: None

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("the toy fails")

    if where == "callback":
        return Counter(), {"callback_on_step_end": fail}, lambda: None
    if where == "scheduler":
        pipe.scheduler.convert_model_output = fail
        return Counter(), {}, lambda: vars(pipe.scheduler).pop("convert_model_output")
    handle = pipe.transformer.blocks[1].register_forward_hook(fail)
    return Counter(), {}, handle.remove


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        *[(RuntimeError, where) for where in ("attend", "denoise", "run", "callback", "scheduler", "model")],
        *[(KeyboardInterrupt, where) for where in ("attend", "denoise", "run")],
    ],
)
def test_failure_inside_a_run(kind: type[BaseException], where: str) -> None:
    entry, pipe, plain, before = rehearsed("wan21")
    recipe, extra, undo = fail_at(pipe, where)
    if kind is KeyboardInterrupt:
        object.__setattr__(recipe, "error", KeyboardInterrupt())
    with patchkit.apply(pipe, [recipe, Scale()]) as patch:
        with pytest.raises(kind):
            tiny.run(entry, pipe, **extra)
        undo()
        installation = patch._live()
        assert not any(b.states for b in installation.bound), "states outlive the failure"
        assert installation.running == 0
        assert not installation.inside | installation._moments.keys()
        assert not installation.tracker._frames
        again = tiny.run(entry, pipe)
    with patchkit.apply(pipe, Scale()):
        assert torch.equal(tiny.run(entry, pipe), again), "the failure shows in the next run"
    assert torch.equal(tiny.run(entry, pipe), plain)
    assert_same(before, fingerprint(pipe))


def test_with_block_removes_on_error() -> None:
    entry, pipe, plain, before = rehearsed("flux")
    with pytest.raises(RuntimeError, match="the toy fails"), patchkit.apply(pipe, Fail(at=2)):
        tiny.run(entry, pipe)
    assert torch.equal(tiny.run(entry, pipe), plain)
    assert_same(before, fingerprint(pipe))


def test_removal_in_the_middle_of_a_run() -> None:
    entry, pipe, plain, before = rehearsed("wan21")
    counter = Counter()
    patch = patchkit.apply(pipe, counter)

    def leave(*_: Any) -> dict[str, Any]:
        patch.remove()
        return {}

    assert torch.equal(tiny.run(entry, pipe, callback_on_step_end=leave), plain)
    assert {c[3] for c in counter.counts} == {0}
    assert_same(before, fingerprint(pipe))


def test_a_report_that_fails_does_not_keep_the_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    entry, pipe, plain, before = rehearsed("wan21")
    patch = patchkit.apply(pipe, Counter())
    tiny.run(entry, pipe)

    def fail(*_: Any) -> None:
        raise RuntimeError("device lost")

    monkeypatch.setattr("patchkit.ledger.Ledger.to_dict", fail)
    patch.remove()
    assert "device lost" in str(patch.report())
    assert torch.equal(tiny.run(entry, pipe), plain)
    assert_same(before, fingerprint(pipe))


def test_removal_reports_what_it_could_not_take_back(caplog: pytest.LogCaptureFixture) -> None:
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    _, pipe, _, _ = rehearsed("wan21")
    patch = patchkit.apply(pipe, Identity())
    theirs = WanAttnProcessor()
    pipe.transformer.blocks[1].attn1.processor = theirs
    with caplog.at_level(logging.WARNING, logger="patchkit"):
        (line,) = patch.remove()
    assert "transformer.blocks.1.attn1.processor" in line
    assert "WanAttnProcessor" in line
    assert line in caplog.text
    assert pipe.transformer.blocks[1].attn1.processor is theirs
