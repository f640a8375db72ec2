"""Recipes around the denoiser and around the whole run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import tiny
import torch
from mechanism.toys import Counter, Identity, Loudness, Scale, Twice, Watch

import patchkit
from patchkit import Recipe, recipe
from patchkit.context import DenoiseCall, RunCall

FOUR = pytest.mark.parametrize("name", ["sd3", "flux", "wan22", "ltx"])
WAYS = pytest.mark.parametrize("way", ["plain", "offload"])


def prepared(name: str, way: str) -> tuple[tiny.TinyPipeline, Any]:
    entry = tiny.PIPELINES[name]
    pipe = entry.build()
    if way == "offload":
        pipe.enable_model_cpu_offload(device="cpu")
    return entry, pipe


def calls_of(pipe: Any, entry: tiny.TinyPipeline) -> tuple[list[str], list[Any]]:
    """Names of the denoisers as they run, filled while the returned hooks stand."""
    calls: list[str] = []
    handles = [getattr(pipe, c).register_forward_pre_hook(lambda *_, c=c: calls.append(c)) for c in entry.denoisers]
    return calls, handles


@WAYS
@FOUR
def test_running_the_denoiser_twice(name: str, way: str) -> None:
    """Twice as many forwards; the mean of two equal results is the result; of two different ones it is not."""
    entry, pipe = prepared(name, way)
    plain = tiny.run(entry, pipe)
    facts = entry.expected
    per_step = {"batched": 1, "two_calls": 2, "one_call": 1}[facts.cfg]
    calls, handles = calls_of(pipe, entry)
    with patchkit.apply(pipe, Twice()) as patch:
        assert torch.equal(tiny.run(entry, pipe), plain)
        assert calls == [c for c in facts.denoiser_of_step for _ in range(2 * per_step)]
        assert patch.report()["recipes"][0]["counts"] == {"averaged": 2 * per_step}
    for handle in handles:
        handle.remove()
    branch = "cond-weak" if facts.cfg != "batched" else "batched-weak"
    with patchkit.apply(pipe, [Twice(), Scale(branch=branch)]):
        halfway = tiny.run(entry, pipe)
    assert not torch.equal(halfway, plain)
    assert torch.equal(tiny.run(entry, pipe), plain)


@WAYS
@FOUR
def test_an_argument_of_its_own(name: str, way: str) -> None:
    entry, pipe = prepared(name, way)
    plain = tiny.run(entry, pipe)
    calls, handles = calls_of(pipe, entry)
    with patchkit.apply(pipe, Loudness()) as patch:
        assert torch.equal(tiny.run(entry, pipe), plain)
        assert torch.equal(tiny.run(entry, pipe, loudness=3.0), plain * 3)
        assert patch.report()["recipes"][0]["rows"][0]["values"] == {"loudness": 3.0}
        calls.clear()
        with pytest.raises(patchkit.InvalidOption, match="loudness is negative"):
            tiny.run(entry, pipe, loudness=-1.0)
        with pytest.raises(TypeError, match="unexpected keyword argument 'loudnes'"):
            tiny.run(entry, pipe, loudnes=1.0)
        assert calls == [], "something ran before the arguments were checked"
        patch.disable()
        with pytest.raises(TypeError, match="unexpected keyword argument 'loudness'"):
            tiny.run(entry, pipe, loudness=1.0)
    for handle in handles:
        handle.remove()
    with pytest.raises(TypeError, match="unexpected keyword argument 'loudness'"):
        tiny.run(entry, pipe, loudness=1.0)


@FOUR
def test_both_around_a_compiled_denoiser(name: str) -> None:
    """One graph for all passes; the numbers are those of the eager run."""
    entry = tiny.PIPELINES[name]
    pipe = entry.build()
    with patchkit.apply(pipe, [Twice(), Scale(branch="batched-weak"), Scale(branch="cond-weak"), Loudness()]):
        eager = tiny.run(entry, pipe, loudness=2.0)
    for component in entry.denoisers:
        getattr(pipe, component).compile(backend="eager", fullgraph=True)
    with patchkit.apply(pipe, [Twice(), Scale(branch="batched-weak"), Scale(branch="cond-weak"), Loudness()]) as patch:
        assert torch.equal(tiny.run(entry, pipe, loudness=2.0), eager)
        report = {r["recipe"]: r for r in patch.report()["recipes"]}
        assert report["toy-twice"]["counts"]["averaged"] > 0
        assert report["toy-scale"]["calls"] > 0
        assert patch.report()["drift"] == []


def test_a_pipeline_that_takes_any_argument() -> None:
    """SD 1.5 does, and ignores it: as ever."""
    entry = tiny.PIPELINES["sd15"]
    pipe = entry.build()
    plain = tiny.run(entry, pipe, unheard_of=1)
    with patchkit.apply(pipe, Loudness()):
        assert torch.equal(tiny.run(entry, pipe, unheard_of=1, loudness=2.0), plain * 2)


def test_a_second_recipes_arguments_are_checked_before_the_first_runs() -> None:
    ran: list[str] = []

    @recipe("toy-eager")
    @dataclass(frozen=True)
    class Eager(Recipe):
        def run(self, call: RunCall, next: Callable[[RunCall], Any]) -> Any:
            ran.append("eager")
            return next(call)

    entry = tiny.PIPELINES["flux"]
    pipe = entry.build()
    with patchkit.apply(pipe, [Eager(), Loudness()]):
        with pytest.raises(patchkit.InvalidOption):
            tiny.run(entry, pipe, loudness=-1.0)
        assert ran == []
        tiny.run(entry, pipe, loudness=1.0)
        assert ran == ["eager"]


def test_an_argument_that_the_pipeline_has_too_reaches_both() -> None:
    got: list[Any] = []

    @recipe("toy-prompt")
    @dataclass(frozen=True)
    class Prompt(Recipe):
        arguments = {"prompt": "several prompts"}

        def run(self, call: RunCall, next: Callable[[RunCall], Any]) -> Any:
            got.append((call.options["prompt"], call.kwargs["prompt"]))
            return next(call.replace(kwargs={**call.kwargs, "prompt": call.options["prompt"][0]}))

    entry = tiny.PIPELINES["flux"]
    pipe = entry.build()
    plain = tiny.run(entry, pipe)
    with patchkit.apply(pipe, Prompt()):
        assert torch.equal(tiny.run(entry, pipe, prompt=[tiny.PROMPT, "another"]), plain)
    assert got == [([tiny.PROMPT, "another"],) * 2]


def test_signature_of_the_call_stays() -> None:
    import inspect

    pipe = tiny.PIPELINES["flux"].build()
    before = inspect.signature(pipe.__call__)
    with patchkit.apply(pipe, Loudness()):
        assert inspect.signature(pipe.__call__) == before
        assert type(pipe).__name__ == "FluxPipeline"


def test_the_second_pass_does_not_disturb_names_and_counts() -> None:
    """A recipe that calls ``next`` twice: branches, steps and op indices are those of the pipeline's own calls."""
    for name in ("sd15", "mochi", "wan21"):
        entry = tiny.PIPELINES[name]
        pipe, watch, alone = entry.build(), Watch(), Watch()
        with patchkit.apply(pipe, alone):
            tiny.run(entry, pipe)
        with patchkit.apply(pipe, [Twice(own_branch=False), watch]):
            tiny.run(entry, pipe)
        once = [(s.component, s.site, s.step, s.branch, s.index) for s in alone.seen]
        twice = [(s.component, s.site, s.step, s.branch, s.index) for s in watch.seen]
        assert sorted(map(str, twice)) == sorted(map(str, once * 2))


def test_a_branch_of_its_own_has_a_state_of_its_own() -> None:
    entry = tiny.PIPELINES["wan21"]
    pipe, counter = entry.build(), Counter()
    with patchkit.apply(pipe, [Twice(), counter]):
        tiny.run(entry, pipe, steps=3)
    branches = {c[1] for c in counter.counts}
    assert branches == {"cond", "cond-weak", "uncond", "uncond-weak"}
    assert all(calls == step + 1 for _, _, _, step, calls in counter.counts)


def test_an_inversion_is_told_its_own_number_of_steps() -> None:
    """Not the number that the pipeline had announced in an earlier, shorter run."""

    @recipe("toy-inversion")
    @dataclass(frozen=True)
    class Inversion(Recipe):
        def run(self, call: RunCall, next: Callable[[RunCall], Any]) -> Any:
            pipe = call.pipeline
            pipe.scheduler.set_timesteps(5)
            with torch.no_grad():
                pipe.transformer(torch.randn(1, 16, 3, 4, 6), pipe.scheduler.timesteps[:1], torch.randn(1, 16, 32))
            return next(call)

    entry = tiny.PIPELINES["wan21"]
    pipe, watch = entry.build(), Watch(layers="0", targets=["attn1"])
    tiny.run(entry, pipe, steps=2)
    with patchkit.apply(pipe, [Inversion(), watch]):
        tiny.run(entry, pipe, steps=3)
    assert [s.total for s in watch.seen] == [5, *[3] * 6]
    assert [s.branch for s in watch.seen] == ["single", *["cond", "uncond"] * 3]


def test_calling_the_module_instead_of_next() -> None:
    """No endless recursion: it is the model without the denoise chain, with the same step and branch."""

    @recipe("toy-direct")
    @dataclass(frozen=True)
    class Direct(Recipe):
        def denoise(self, call: DenoiseCall, next: Callable[[DenoiseCall], Any]) -> Any:
            call.module(*call.args, **call.kwargs)
            return next(call)

    entry = tiny.PIPELINES["wan21"]
    pipe, watch = entry.build(), Watch()
    plain = tiny.run(entry, pipe)
    with patchkit.apply(pipe, [Direct(), watch]):
        assert torch.equal(tiny.run(entry, pipe), plain)
    assert len(watch.denoised) == 4
    assert len(watch.seen) == 2 * 4 * 4
    assert {(s.step, s.branch) for s in watch.seen} == {(i, b) for i in range(2) for b in ("cond", "uncond")}


@pytest.mark.parametrize("options", [{}, {"layers": "0"}, {"steps": (0.5, 1.0)}])
def test_a_denoise_recipe_where_no_site_can_be_patched(options: dict[str, Any]) -> None:
    """Its level needs no attention site; but a selection that matches none is still an error."""

    @recipe("toy-outside")
    @dataclass(frozen=True)
    class Outside(Recipe):
        kinds = ("joint",)  # Wan has none

        def denoise(self, call: DenoiseCall, next: Callable[[DenoiseCall], Any]) -> Any:
            call.ledger.count("ran")
            return next(call)

    entry = tiny.PIPELINES["wan21"]
    pipe = entry.build()
    if "layers" in options:
        with pytest.raises(patchkit.NothingMatched):
            patchkit.apply(pipe, Outside(**options))
        return
    with patchkit.apply(pipe, Outside(**options)) as patch:
        tiny.run(entry, pipe)
        assert patch.report()["recipes"][0]["counts"] == {"ran": 2 if options else 4}


def test_a_recipe_may_call_the_pipeline_inside_its_run() -> None:
    @recipe("toy-nested")
    @dataclass(frozen=True)
    class Nested(Recipe):
        def run(self, call: RunCall, next: Callable[[RunCall], Any]) -> Any:
            inner = call.pipeline(*call.args, **{**call.kwargs, "generator": torch.Generator().manual_seed(1)})
            return (inner[0] + next(call)[0],)

    entry = tiny.PIPELINES["flux"]
    pipe = entry.build()
    first, second = tiny.run(entry, pipe), tiny.run(entry, pipe, seed=1)
    with patchkit.apply(pipe, [Nested(), Identity()]):
        assert torch.equal(tiny.run(entry, pipe), first + second)


@pytest.mark.parametrize("when", ["before", "after"])
def test_offload_before_and_after_patching(when: str) -> None:
    """And patch, run, run, remove while the hooks stand."""
    entry = tiny.PIPELINES["wan21"]
    plain = tiny.run(entry, entry.build())
    pipe = entry.build()
    if when == "before":
        pipe.enable_model_cpu_offload(device="cpu")
    recipes: list[Recipe] = [Identity(), Twice(), Loudness()]
    with patchkit.apply(pipe, recipes) as patch:
        if when == "after":
            pipe.enable_model_cpu_offload(device="cpu")
        for _ in range(2):
            assert torch.equal(tiny.run(entry, pipe, loudness=2.0), plain * 2)
            assert [r["calls"] > 0 for r in patch.report()["recipes"]] == [True] * 3
        assert patch.report()["drift"] == []
    assert torch.equal(tiny.run(entry, pipe), plain)
    pipe.remove_all_hooks()
    assert torch.equal(tiny.run(entry, pipe), plain)
    assert type(pipe.transformer).__mro__[0] is type(entry.build().transformer)


def test_a_denoise_wrapper_knows_the_sites_that_its_recipe_has_selected() -> None:
    """Each recipe its own; so it can prepare for its attention ops (a language model's cache, for one)."""

    @dataclass(frozen=True)
    class Asks(Recipe):
        name = "toy-asks"

        def validate(self) -> None:
            object.__setattr__(self, "found", [])

        def denoise(self, call: DenoiseCall, next: Callable[[DenoiseCall], Any]) -> Any:
            self.found.append([site.name for site in call.sites])  # type: ignore[attr-defined]
            return next(call)

    entry = tiny.MODELS["llama"]
    model, all_layers, last = entry.build(), Asks(), Asks(layers="-1")
    with patchkit.apply(model, [all_layers, last]):
        tiny.forward(entry, model)
    names = [f"model.layers.{i}.self_attn" for i in range(2)]
    assert all_layers.found == [names]  # type: ignore[attr-defined]
    assert last.found == [names[1:]]  # type: ignore[attr-defined]
