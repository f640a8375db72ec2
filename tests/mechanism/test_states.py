"""What recipes keep: one state for each (component, site, branch, op index), for one run; and whose it is."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from dataclasses import dataclass, replace
from typing import Any

import pytest
import tiny
import torch
from fingerprint import assert_same, fingerprint
from mechanism.toys import Counter, Identity, Scale, Watch

import patchkit


def keys(counter: Counter) -> set[tuple[Any, ...]]:
    return {c[:3] for c in counter.counts}


@pytest.mark.parametrize("name", ["wan22", "mochi", "sd15", "hunyuan"])
def test_one_state_a_key(name: str) -> None:
    """Every key counts its own calls, from 1 on at the first step that it sees."""
    entry = tiny.PIPELINES[name]
    pipe, counter = entry.build(), Counter()
    with patchkit.apply(pipe, counter):
        for _ in range(2):
            counter.counts.clear()
            tiny.run(entry, pipe, steps=4)
            by_key: dict[Any, list[int]] = {}
            for *key, _, calls in counter.counts:
                by_key.setdefault(tuple(key), []).append(calls)
            assert all(calls == list(range(1, len(calls) + 1)) for calls in by_key.values())
            sites, names = {k[0] for k in by_key}, {k[1] for k in by_key}
            indices = {k[2] for k in by_key}
            assert len(by_key) == len(sites) * len(names) * len(indices)
            assert names == ({"cond", "uncond"} if name == "wan22" else {"cond"} if name == "hunyuan" else {"batched"})
            assert indices == ({0, 1} if name == "mochi" else {0})
    if name == "wan22":
        assert {k.split(".")[0] for k in sites} == {"transformer", "transformer_2"}


def test_states_and_ledgers_end_with_the_run() -> None:
    entry = tiny.PIPELINES["wan21"]
    pipe, counter = entry.build(), Counter()
    with patchkit.apply(pipe, counter) as patch:
        (bound,) = patch._live().bound
        for steps in (2, 3):
            tiny.run(entry, pipe, steps=steps)
            assert bound.states == {}
            assert patch.report()["recipes"][0]["counts"] == {"counted": steps * 2 * 4}


def test_setting_the_timesteps_clears_states_within_a_run() -> None:
    """A recipe may run the schedule twice, for an inversion: ledgers go on, states begin again."""
    entry = tiny.PIPELINES["wan21"]
    pipe, counter = entry.build(), Counter()
    sizes: list[int] = []

    def again(p: Any, step: int, *_: Any) -> dict[str, Any]:
        sizes.append(len(patch._live().bound[0].states))
        if step == 0:
            p.scheduler.set_timesteps(2)
            sizes.append(len(patch._live().bound[0].states))
            p.scheduler.set_begin_index(1)
        return {}

    with patchkit.apply(pipe, counter) as patch:
        tiny.run(entry, pipe, callback_on_step_end=again)
        assert sizes == [8, 0, 8]
        assert patch.report()["recipes"][0]["counts"] == {"counted": 16}


def test_disabling_drops_states_and_enabling_starts_anew() -> None:
    entry = tiny.PIPELINES["wan21"]
    pipe = entry.build()
    plain = tiny.run(entry, pipe)
    with patchkit.apply(pipe, Scale()) as patch:
        scaled = tiny.run(entry, pipe)
        patch.disable()
        assert not patch.enabled
        assert torch.equal(tiny.run(entry, pipe), plain)
        assert "(disabled)" in repr(patch)
        patch.enable()
        assert torch.equal(tiny.run(entry, pipe), scaled)
    assert not torch.equal(scaled, plain)


def test_two_pipelines_know_nothing_of_each_other() -> None:
    entry = tiny.PIPELINES["wan21"]
    one, two = entry.build(), entry.build()
    plain = tiny.run(entry, two)
    before = fingerprint(two)
    counter = Counter()
    with patchkit.apply(one, [Scale(), counter]):
        assert_same(before, fingerprint(two))
        assert torch.equal(tiny.run(entry, two), plain)
        assert counter.counts == []
        other = Watch()
        with patchkit.apply(two, other):
            scaled = tiny.run(entry, one)
            assert other.seen == []
        assert torch.equal(tiny.run(entry, two), plain)
        assert torch.equal(tiny.run(entry, one), scaled)


def test_one_recipe_object_on_two_pipelines() -> None:
    entry = tiny.PIPELINES["wan21"]
    one, two, counter = entry.build(), entry.build(), Counter()
    with patchkit.apply(one, counter), patchkit.apply(two, counter):
        tiny.run(entry, one)
        first = list(counter.counts)
        counter.counts.clear()
        tiny.run(entry, two)
        assert counter.counts == first


def test_two_threads_with_a_pipeline_each() -> None:
    entry = tiny.PIPELINES["wan21"]
    plain = tiny.run(entry, entry.build(), steps=3)
    pipes = [entry.build(), entry.build()]  # here: building sets the process's random state
    results: dict[int, Any] = {}
    start = threading.Barrier(2)

    def work(number: int) -> None:
        pipe, watch = pipes[number], Watch()
        with patchkit.apply(pipe, watch):
            start.wait(timeout=20)
            results[number] = tiny.run(entry, pipe, steps=3), [(s.step, s.branch, s.site) for s in watch.seen]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(timeout=60)
    assert results[0][1] == results[1][1]
    assert len(results[0][1]) == 3 * 2 * 4
    assert torch.equal(results[0][0], plain)
    assert torch.equal(results[1][0], plain)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_scheduler_shared_by_two_patched_pipelines(order: tuple[int, int]) -> None:
    entry = tiny.PIPELINES["wan21"]
    pipes = [entry.build(), entry.build()]
    pipes[1].scheduler = pipes[0].scheduler
    for pipe in pipes:
        plain = tiny.run(entry, pipe)
    prints = [fingerprint(pipe) for pipe in pipes]
    watches = [Watch(), Watch()]
    patches = [patchkit.apply(pipe, watch) for pipe, watch in zip(pipes, watches, strict=True)]
    for pipe, watch in zip(pipes, watches, strict=True):
        assert torch.equal(tiny.run(entry, pipe), plain)
        assert [s.step for s in watch.seen] == [0] * 8 + [1] * 8
    patches[order[0]].remove()
    stays = order[1]
    watches[stays].seen.clear()
    tiny.run(entry, pipes[stays])
    assert [s.step for s in watches[stays].seen] == [0] * 8 + [1] * 8
    patches[stays].remove()
    for pipe, before in zip(pipes, prints, strict=True):
        assert_same(before, fingerprint(pipe))


def test_a_scheduler_swapped_after_patching() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    entry = tiny.PIPELINES["wan21"]
    pipe, watch = entry.build(), Watch()
    old = pipe.scheduler
    kind = type(old)
    with patchkit.apply(pipe, watch):
        pipe.scheduler = new = FlowMatchEulerDiscreteScheduler()
        tiny.run(entry, pipe)
        assert [s.step for s in watch.seen] == [0] * 8 + [1] * 8
        assert patchkit.status(pipe)["drift"] == []
    assert type(new) is FlowMatchEulerDiscreteScheduler
    assert type(old) is kind


def test_a_new_scheduler_made_from_the_patched_ones_class() -> None:
    entry = tiny.PIPELINES["wan21"]
    pipe = entry.build()
    kind = type(pipe.scheduler)
    with patchkit.apply(pipe, Identity()):
        assert type(pipe.scheduler.__class__.from_config(pipe.scheduler.config)) is kind
        assert type(type(pipe)(**pipe.components)).__mro__[0] is type(entry.build())


def test_a_bare_denoiser_finds_its_steps_by_the_timestep() -> None:
    entry = tiny.PIPELINES["wan21"]
    pipe = entry.build()
    model, watch, counter = (
        pipe.transformer,
        Watch(layers="0", targets=["attn1"]),
        Counter(layers="0", targets=["attn1"]),
    )
    with patchkit.apply(model, [watch, counter]), torch.no_grad():
        for t in (900, 900, 500, 100, 900, 500):
            model(torch.randn(1, 16, 3, 4, 6), torch.tensor([t]), torch.randn(1, 16, 32))
    assert [s.step for s in watch.seen] == [0, 0, 1, 2, 0, 1]
    assert [c[-1] for c in counter.counts] == [1, 2, 3, 4, 1, 2]


def branches(watch: Watch) -> list[str]:
    found = [s.branch for s in watch.seen]
    watch.seen.clear()
    return list(dict.fromkeys(found))


def test_each_run_finds_its_own_guidance_branches() -> None:
    """What a run learnt of its batch must not name the next run's branches: two samples are as many as two halves."""
    entry = tiny.PIPELINES["sd15"]
    pipe, watch = entry.build(), Watch()
    two = {"prompt": ["a red circle", "two cats"], "negative_prompt": None}
    with patchkit.apply(pipe, watch):
        tiny.run(entry, pipe)
        assert branches(watch) == ["batched"]
        tiny.run(entry, pipe, variant="no_cfg", **two)
        assert branches(watch) == ["single"]
        tiny.run(entry, pipe)
        assert branches(watch) == ["batched"]


def test_two_videos_from_the_same_noise_are_not_two_halves_of_guidance() -> None:
    entry = tiny.PIPELINES["cogvideox2b"]  # which does not say whether it guides, only by how much
    pipe, watch = entry.build(), Watch()
    noise = torch.randn(1, 3, 4, 4, 6).repeat(2, 1, 1, 1, 1)
    two = {"prompt": ["a red circle", "two cats"], "negative_prompt": None, "latents": noise}
    with patchkit.apply(pipe, watch):
        tiny.run(entry, pipe, variant="no_cfg", **two)
        assert branches(watch) == ["single"]
        tiny.run(entry, pipe, **two)
        assert branches(watch) == ["batched"]


def test_a_run_that_broke_off_within_a_step_leaves_no_count_of_calls() -> None:
    entry = tiny.PIPELINES["sd15"]
    pipe, watch = entry.build(), Watch()

    def stop(*_: Any) -> None:
        raise RuntimeError("stop")

    with patchkit.apply(pipe, watch):
        handle = pipe.unet.register_forward_hook(stop)
        with pytest.raises(RuntimeError, match="stop"):
            tiny.run(entry, pipe)
        handle.remove()
        watch.seen.clear()
        tiny.run(entry, pipe)
        assert branches(watch) == ["batched"]


def test_a_schedule_set_by_hand_begins_anew_too() -> None:
    """A loop of one's own around a patched pipeline's parts: no call of the pipeline marks the begin of a run."""
    entry = tiny.PIPELINES["sd15"]
    pipe, watch = entry.build(), Watch()
    latents, text = torch.randn(2, 4, 4, 6), torch.randn(2, 7, 32)
    same = latents[:1].repeat(2, 1, 1, 1)
    with patchkit.apply(pipe, watch), torch.no_grad():
        for sample, expected in ((same, "batched"), (latents, "single"), (same, "batched")):
            pipe.scheduler.set_timesteps(2)
            for t in pipe.scheduler.timesteps[:1]:  # leaves off before the step
                pipe.unet(sample, t, encoder_hidden_states=text)
            assert branches(watch) == [expected]


def test_a_bare_denoiser_finds_each_runs_guidance_branches() -> None:
    entry = tiny.PIPELINES["wan21"]
    model, watch = entry.build().transformer, Watch(layers="0", targets=["attn1"])
    latents, text = torch.randn(2, 16, 3, 4, 6), torch.randn(2, 16, 32)
    same = latents[:1].repeat(2, 1, 1, 1, 1)
    with patchkit.apply(model, watch), torch.no_grad():
        for sample, expected in ((same, "batched"), (latents, "single"), (same, "batched")):
            for t in (900, 500):
                model(sample, torch.tensor([t, t]), text)
            assert branches(watch) == [expected]


def test_nothing_keeps_a_pipeline_alive() -> None:
    entry = tiny.PIPELINES["wan21"]
    pipe = entry.build()
    patch = patchkit.apply(pipe, Counter())
    tiny.run(entry, pipe)
    alive = weakref.ref(pipe), weakref.ref(pipe.transformer), weakref.ref(pipe.transformer.blocks[0].attn1)
    patch.remove()
    del pipe
    gc.collect()
    assert [a() for a in alive] == [None] * 3, "the handle of a removed patch keeps the pipeline"
    pipe = entry.build()
    patch = patchkit.apply(pipe, Counter())
    alive = weakref.ref(pipe), weakref.ref(pipe.transformer)
    del pipe, patch
    gc.collect()
    assert [a() for a in alive] == [None, None], "a patch keeps the pipeline"


def test_a_patch_works_without_its_handle() -> None:
    entry = tiny.PIPELINES["wan21"]
    pipe, watch = entry.build(), Watch()
    patchkit.apply(pipe, watch)
    gc.collect()
    tiny.run(entry, pipe)
    assert watch.seen
    assert patchkit.remove(pipe) == []
    assert not patchkit.status(pipe)["patched"]


def test_copies_share_no_state() -> None:
    entry = tiny.PIPELINES["wan21"]
    pipe, watch = entry.build(), Watch()
    with patchkit.apply(pipe, watch):
        twin = copy.deepcopy(pipe)
        with patchkit.apply(twin, Identity()):
            tiny.run(entry, twin)
        assert watch.seen == []


@patchkit.recipe("toy-halves")
@dataclass(frozen=True, kw_only=True)
class Halves(patchkit.Recipe):
    """Forwards everything twice, as two parts; what its run laid down it must find at every step."""

    before = ("toy-counter",)

    def run(self, call: Any, next: Any) -> Any:
        call.carried["laid down"] = call.shared["gone"] = 1
        return next(call)

    def denoise(self, call: Any, next: Any) -> Any:
        assert call.carried["laid down"] == 1
        assert "gone" not in call.shared  # the timesteps were set in between
        moment = call.moment
        return [next(call.replace(moment=replace(moment, part=part))) for part in ("left", "right")][1]


def test_parts_of_a_call_have_states_of_their_own_and_one_ledger() -> None:
    entry = tiny.PIPELINES["wan21"]
    pipe, counter = entry.build(), Counter()
    plain = tiny.run(entry, pipe)
    with patchkit.apply(pipe, [Halves(), counter]) as patch:
        assert torch.equal(tiny.run(entry, pipe), plain)
        assert all(count[-1] <= 2 for count in counter.counts)  # of two steps, not of four forwards
        assert {row["branch"] for row in patch.report()["recipes"][1]["rows"]} == {"cond", "uncond"}
        assert all(not bound.carried for bound in patch._live().bound)
