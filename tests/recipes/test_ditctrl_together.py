"""DiTCtrl with the other recipes: SoftPAG around it, AdaSpa and PAROAttention inside its tiles."""

from __future__ import annotations

from typing import Any

import pytest
import softpag_tools
import tiny
import torch
from ditctrl_tools import Inside, Pairwise, build, loud, run
from softpag_tools import Naive, close, nothing_shared
from torch import Tensor

import patchkit
from patchkit.recipes.ditctrl import DiTCtrl
from patchkit.recipes.headhunter import SoftPAG

# pipeline, its variant, blocks to build (Hunyuan: of each kind)
CASES = {
    "cogvideox": ("cogvideox", None, 4),
    "cogvideox2b": ("cogvideox2b", None, 4),
    "cogvideox, no guidance": ("cogvideox2b", "no_cfg", 4),
    "wan": ("wan21", None, 4),
    "wan, two denoisers": ("wan22", None, 4),
    "hunyuan": ("hunyuan", None, 2),
    "hunyuan, two calls": ("hunyuan", "true_cfg", 2),
    "mochi": ("mochi", None, 4),
    "ltx": ("ltx", None, 4),
}
SOME = ("cogvideox", "wan", "hunyuan, two calls", "mochi")  # guidance in one batch, in two calls, half by half
PROMPTS = ["a red circle", "a blu circle"]
OPTIONS: dict[str, Any] = {"overlap": 1, "kv_layers": "2-", "kv_steps": (1, 3), "zero_uncond": False}
HEADS = {"before the shared keys": [(1, 0)], "at them": [(2, 1)], "behind": [(3, 0), (3, 1)]}


def case(name: str) -> tuple[Any, Any, dict[str, Any]]:
    pipeline, variant, layers = CASES[name]
    entry, pipe = build(pipeline, layers)
    if pipeline == "wan22":
        loud(pipe)
    call: dict[str, Any] = {"variant": variant, "prompt": PROMPTS, "negative_prompt": None}
    if variant == "true_cfg":
        call["negative_prompt"] = "blur"
    return entry, pipe, call


def softpag(**options: Any) -> SoftPAG:
    return SoftPAG(**{"heads": [(1, 0), (2, 1)], "strength": 0.6, "scale": 2.0, **options})


# --- SoftPAG --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOME)
def test_softpag_without_guidance_changes_no_bit(name: str) -> None:
    entry, pipe, call = case(name)
    recipe = DiTCtrl(**OPTIONS, objects="circle")
    alone = run(entry, pipe, recipe, **call)
    assert torch.equal(run(entry, pipe, [recipe, softpag(scale=0.0)], **call), alone)
    assert not torch.equal(run(entry, pipe, [recipe, softpag()], **call), alone)


@pytest.mark.parametrize("name", ["cogvideox", "wan", "hunyuan"])
def test_one_prompt_is_softpag_alone(name: str) -> None:
    entry, pipe, call = case(name)
    call["prompt"] = PROMPTS[0]
    alone = run(entry, pipe, softpag(), 3, **call)
    assert torch.equal(run(entry, pipe, [DiTCtrl(**OPTIONS), softpag()], 3, **call), alone)


@pytest.mark.parametrize(
    "name", ["cogvideox", "cogvideox, no guidance", "wan", "hunyuan", "hunyuan, two calls", "mochi", "ltx"]
)
def test_each_tile_is_guided_as_a_video_by_itself(name: str) -> None:
    """Segments that do not touch, without shared keys: what SoftPAG keeps of one must not reach another."""
    entry, pipe, call = case(name)
    if name.startswith("cogvideox"):
        pipe.scheduler = build("cogvideox2b")[1].scheduler  # deterministic
    if name == "ltx":  # else the schedule would depend on the length of the video
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, use_dynamic_shifting=False)
    axis = 1 if name.startswith(("cogvideox", "ltx")) else 2
    guide = softpag()
    size = list(run(entry, pipe, guide, 2, **{**call, "prompt": PROMPTS[0]}).shape)
    double = [2 * n if i == axis else n for i, n in enumerate(size)]
    noise = torch.randn(*double, generator=torch.Generator().manual_seed(1))
    recipe = DiTCtrl(overlap=0, transitions=0, kv_steps=None, zero_uncond=False)
    found = run(entry, pipe, [recipe, guide], 3, latents=noise, **call)
    for i, prompt in enumerate(PROMPTS):
        part = noise.narrow(axis, i * size[axis], size[axis])
        expected = run(entry, pipe, guide, 3, **{**call, "prompt": prompt, "latents": part})
        got = found.narrow(axis, i * size[axis], size[axis])
        if name == "mochi":  # its halves are forwarded one by one in tiles
            torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)
        else:
            assert torch.equal(got, expected)


def weak_ones(entry: Any, pipe: Any, recipe: DiTCtrl, guide: SoftPAG, **call: Any) -> list[Tensor]:
    inside = softpag_tools.Inside()
    run(entry, pipe, [guide, inside, recipe], 3, **call)
    return inside.weak()


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("wan", HEADS["at them"]),
        ("cogvideox", HEADS["before the shared keys"]),
        ("wan, two denoisers", HEADS["behind"]),
        ("hunyuan, two calls", HEADS["before the shared keys"]),
        ("mochi", HEADS["at them"]),
        ("ltx", HEADS["behind"]),
    ],
)
def test_the_weak_pass_is_a_whole_pass_over_all_tiles(name: str, heads: list[tuple[int, int]]) -> None:
    """With keys shared by masks: against a second pass that shares nothing, and pair by pair."""
    entry, pipe, call = case(name)
    options = {**OPTIONS, "objects": "circle", "kv_steps": (1, 2)}
    guide = softpag(heads=heads, scale=1e-20)
    found = weak_ones(entry, pipe, DiTCtrl(**options), guide, **call)
    pairwise = weak_ones(entry, pipe, Pairwise(**options), guide, **call)
    naive = Naive(pairs=heads, u=0.6, names=r".*\.attn1?")
    run(entry, pipe, [naive, DiTCtrl(**options)], 3, **call)
    assert len(found) == len(naive.found) == 3
    for a, b, (_, cond, c) in zip(found, pairwise, naive.found, strict=True):
        close(a, b, 1e-6)  # where a batch holds both halves, what the passes share comes of another batch
        close(a, c)
        assert float((a - cond).norm() / cond.norm()) > 1e-3


@pytest.mark.parametrize("name", ["wan", "hunyuan"])
def test_sharing_the_prefix_of_each_tile_changes_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the conditional samples run by themselves; in one batch with others products round otherwise."""
    entry, pipe, call = case(name)
    recipe, guide = DiTCtrl(**OPTIONS, objects="circle"), softpag(heads=[(3, 0)])
    shared = run(entry, pipe, [recipe, guide], **call)
    with nothing_shared(monkeypatch):
        assert torch.equal(run(entry, pipe, [recipe, guide], **call), shared)


@pytest.mark.parametrize("name", ["cogvideox2b", "cogvideox, no guidance", "wan", "hunyuan", "mochi"])
def test_softpag_guides_both_videos_of_an_edit(name: str) -> None:
    """The source as it is alone under SoftPAG: a batch of two videos is not taken for two halves of guidance."""
    entry, pipe, call = case(name)
    if name.startswith("cogvideox"):
        pipe.scheduler = build("cogvideox2b")[1].scheduler
    swap = DiTCtrl(**{**OPTIONS, "kv_steps": (0, 2)}, mode="swap", objects="circle")
    both = run(entry, pipe, [swap, softpag()], 2, **call)
    expected = run(entry, pipe, softpag(), 2, **{**call, "prompt": PROMPTS[0]})
    torch.testing.assert_close(both[:1], expected, atol=1e-3, rtol=1e-3)
    without = run(entry, pipe, swap, 2, **call)
    assert (both[1:] - without[1:]).norm() / without.norm() > 1e-4


def test_softpag_reports_its_cost_by_tiles() -> None:
    entry, pipe, call = case("wan")
    with patchkit.apply(pipe, [softpag(heads=[(3, 0)]), DiTCtrl(**OPTIONS)]) as patch:
        tiny.run(entry, pipe, steps=4, **call)
        figures = patch.report()["recipes"][0]["figures"]
    assert figures["extra forwards a step, in blocks"] == pytest.approx(1 / 4)
    assert figures["extra forwards a step, predicted"] == pytest.approx(1 / 4)


def test_nothing_of_softpag_is_kept_after_a_step() -> None:
    entry, pipe, call = case("wan")
    with patchkit.apply(pipe, [softpag(heads=[(3, 0)]), DiTCtrl(**OPTIONS)]) as patch:
        kept: list[Any] = []

        def look(*_: Any) -> dict[str, Any]:
            kept.extend(k for b in patch._bounds for k in b.shared if k[0] == "kept")
            return {}

        tiny.run(entry, pipe, steps=2, **call, callback_on_step_end=look)
    assert not kept


# --- block-sparse attention inside tiles ----------------------------------------------------------------------

SPARSE = {"warmup_steps": 1, "min_tokens": 0, "block_size": 4, "search_steps": []}
STEPS = 5


def counted(entry: Any, pipe: Any, recipes: list[Any], **call: Any) -> tuple[Tensor, Any, Inside]:
    """Latents, the report of the last recipe, and the ops that DiTCtrl handed on."""
    inside = Inside()
    with patchkit.apply(pipe, [recipes[0], inside, *recipes[1:]]) as patch:
        out = tiny.run(entry, pipe, steps=STEPS, **call)
        return out, patch.report()["recipes"][-1], inside


@pytest.mark.parametrize("guided", [False, True], ids=["shared", "guided"])
@pytest.mark.parametrize("name", ["wan", "hunyuan"])
def test_adaspa_searches_for_each_tile_role_and_pass(name: str, guided: bool) -> None:
    entry, pipe, call = case(name)
    adaspa = patchkit.recipes()["adaspa"]
    recipe = DiTCtrl(**OPTIONS, objects="circle" if guided else None)
    alone = run(entry, pipe, recipe, STEPS, **call)
    everything = run(entry, pipe, [adaspa(density=1.0, **SPARSE), recipe], STEPS, **call)
    torch.testing.assert_close(everything, alone, atol=1e-3, rtol=1e-3)
    out, report, inside = counted(entry, pipe, [recipe, adaspa(density=0.4, **SPARSE)], **call)
    assert torch.isfinite(out).all()
    assert (out - alone).norm() / alone.norm() > 1e-3
    passes = 2 if name == "wan" else 1
    # each search once: three segments in every layer, the last as target in those before the first that shares keys
    # (its only forward then), and two targets in those that do, unless their tokens are gathered
    assert report["counts"]["searches"] == passes * (3 * 4 + 2 + (0 if guided else 2 * 2))
    whole = [c for _, _, _, c in inside.ops if c.site.kind != "cross" and c.q.shape[2] == c.k.shape[2]]
    gathered = report["dense"].get("queries and keys differ in number", 0)
    assert report["counts"]["sparse"] + sum(report["dense"].values()) - gathered == len(whole)
    assert ("queries and keys differ in number" in report["dense"]) == guided


def plan_for(entry: Any, pipe: Any, call: dict[str, Any], **size: Any) -> Any:
    from patchkit.recipes.paro import calibrate

    pipe.set_progress_bar_config(disable=True)
    known = ("prompt", "output_type", "generator")
    given = {n: v for n, v in entry.arguments(call["variant"], **size).items() if n not in known}
    options = {"num_inference_steps": STEPS, "buckets": 2, "block_size": 4, "order_steps": 1}
    return calibrate(pipe, PROMPTS[0], 0.4, **options, **given)


@pytest.mark.parametrize("guided", [False, True], ids=["shared", "guided"])
@pytest.mark.parametrize("name", ["cogvideox", "wan", "hunyuan"])
def test_paro_runs_the_plan_of_one_segment_in_every_tile(name: str, guided: bool) -> None:
    """Sparse wherever a whole sequence attends, with own keys or shared ones; gathered tokens run dense."""
    from patchkit.recipes.paro import Paro, PermutePlan

    entry, pipe, call = case(name)
    plan = plan_for(entry, pipe, call)
    everything = PermutePlan.from_masks(plan.order, torch.ones_like(plan.masks), plan.facts)
    recipe = DiTCtrl(**OPTIONS, objects="circle" if guided else None)
    alone = run(entry, pipe, recipe, STEPS, **call)
    same = run(entry, pipe, [recipe, Paro(plan=everything)], STEPS, **call)
    torch.testing.assert_close(same, alone, atol=1e-3, rtol=1e-3)
    out, report, inside = counted(entry, pipe, [recipe, Paro(plan=plan)], **call)
    assert torch.isfinite(out).all()
    assert (out - alone).norm() / alone.norm() > 1e-3
    ops = [c for _, _, _, c in inside.ops if c.site.kind != "cross"]
    whole = [c for c in ops if c.grid is not None]
    assert report["counts"]["sparse"] == len(whole)
    assert sum(report["dense"].values()) == len(ops) - len(whole)
    assert (len(ops) > len(whole)) == guided
    assert any(c.moment.part.endswith("target") for c in whole)


def test_a_plan_for_the_whole_video_is_refused() -> None:
    from patchkit.recipes.paro import Paro, PlanError

    entry, pipe, call = case("wan")
    plan = plan_for(entry, pipe, call, num_frames=17)
    with pytest.raises(PlanError, match="made for a grid"):
        run(entry, pipe, [DiTCtrl(**OPTIONS), Paro(plan=plan)], STEPS, **call)
