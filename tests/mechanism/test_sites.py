"""What a recipe is told at every attention call of every pipeline, against ``tiny/facts.py`` and the call itself."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import tiny
import torch
from mechanism.toys import Seen, Watch

import patchkit
from patchkit.context import Grid, Span

STEPS = 2
KINDS = {"self", "cross", "joint"}
PIPELINES = pytest.mark.parametrize("name", tiny.PIPELINES)

# What the same prompts come to in two more runs: text tokens of (cond, uncond), by sample where samples differ
BATCH_WORDS = {"pixart": (14, 10, 6, 7), "sana": (13, 9, 5, 6), "ltx": (14, 10, 6, 7), "hunyuan": (13, 9)}


@functools.cache
def built(name: str) -> Any:
    return tiny.PIPELINES[name].build()


def watched(name: str, **extra: Any) -> tuple[list[Seen], torch.Tensor, Watch]:
    """What a watching recipe saw of a run, whose result is checked to be the unpatched one."""
    entry, pipe = tiny.PIPELINES[name], built(name)
    plain = tiny.run(entry, pipe, **extra)
    watch = Watch()
    with patchkit.apply(pipe, watch) as patch:
        latents = tiny.run(entry, pipe, **extra)
        report = patch.report()
    assert torch.equal(latents, plain), "an identity recipe changes the result"
    (row,) = report["recipes"]
    assert row["calls"] == len(watch.seen) + len(watch.denoised)
    return watch.seen, latents, watch


def expected(
    name: str,
    *,
    variant: str | None = None,
    steps: int = STEPS,
    samples: int = 1,
    sizes: dict[str, Grid] | None = None,
) -> list[Seen]:
    """Every call in order, from the facts alone. ``sizes`` replaces a site's grid, found by the default one's text."""
    facts = tiny.PIPELINES[name].expected
    cfg = facts.cfg_of.get(variant, facts.cfg) if variant else facts.cfg
    contexts = facts.contexts_of.get(variant, facts.contexts) if variant else facts.contexts
    names = [c for c in contexts if c != "cond_uncond"] or ["batched" if cfg == "batched" else "single"]
    rows: list[Seen] = []
    for step in range(steps):
        component = facts.denoiser_of_step[min(step * 2 // steps, 1)]
        for branch in names:
            for site in facts.sites:
                if site.kind in KINDS:
                    grid = (sizes or {}).get(site.name) or Grid(*site.grid)
                    rows += _calls(facts, site, component, grid, branch, step, steps, samples)
    return rows


def _calls(
    facts: Any, site: Any, component: str, grid: Grid, branch: str, step: int, steps: int, samples: int
) -> list[Seen]:
    batch = samples * (2 if branch == "batched" else 1)
    side = 1 if branch == "uncond" else 0
    texts = [facts.text[side]] if site.ops == 1 else [facts.text[1], facts.text[0]] if branch == "batched" else [14]
    words = [facts.words[1], facts.words[0]] if branch == "batched" else [facts.words[side]]
    rows = []
    for index, text in enumerate(texts):
        tokens = grid.tokens
        queries = tokens + text if site.kind == "joint" else tokens
        keys = text if site.kind == "cross" else queries
        span = {"self": None, "cross": Span(0, keys)}.get(site.kind)
        if site.kind == "joint":
            span = Span(0, text) if site.text == "first" else Span(tokens, queries)
        extra = tokens if site.kind == "joint" else 0
        visible = [extra + w for w in words] if site.mask in ("additive", "bool_key") else None
        shape = (batch if site.ops == 1 else 1, site.heads)
        q, k = (*shape, queries, site.head_dim), (*shape, keys, site.head_dim)
        rows.append(
            Seen(
                component,
                site.name,
                site.kind,
                site.layer,
                q,
                k,
                site.mask,
                visible,
                False,
                grid,
                span,
                None,
                step,
                steps,
                branch,
                index,
            )
        )
    return rows


def differences(got: list[Seen], wanted: list[Seen]) -> list[str]:
    lines = [f"{len(got)} calls, not {len(wanted)}"] if len(got) != len(wanted) else []
    for a, b in zip(got, wanted, strict=False):
        lines += [
            f"{a.site} step {a.step}: {f} is {getattr(a, f)}, not {getattr(b, f)}"
            for f in Seen._fields
            if getattr(a, f) != getattr(b, f)
        ]
    return lines[:10]


@PIPELINES
def test_default_call(name: str) -> None:
    """Kind, layer, shapes, mask and what it hides, grid, text span, step, total, branch, op index; no more calls."""
    got, _, watch = watched(name)
    assert not differences(got, expected(name))
    facts = tiny.PIPELINES[name].expected
    per_step = {"batched": 1, "two_calls": 2, "one_call": 1}[facts.cfg]
    assert [c for c, _ in watch.denoised] == [c for c in facts.denoiser_of_step for _ in range(per_step)]
    assert {(m.step, m.total) for _, m in watch.denoised} == {(0, STEPS), (1, STEPS)}


@PIPELINES
def test_second_call_starts_anew(name: str) -> None:
    entry, pipe, watch = tiny.PIPELINES[name], built(name), Watch()
    with patchkit.apply(pipe, watch):
        tiny.run(entry, pipe, steps=3)
        first = list(watch.seen)
        watch.seen.clear()
        tiny.run(entry, pipe)
        assert not differences(watch.seen, expected(name))
    assert {s.total for s in first} == {3}
    assert {s.step for s in first} == {0, 1, 2}


@pytest.mark.parametrize(
    ("name", "variant"),
    [(n, v) for n, e in tiny.PIPELINES.items() for v in ("no_cfg", "true_cfg") if v in e.variants],
)
def test_guidance_variants(name: str, variant: str) -> None:
    got, _, _ = watched(name, variant=variant)
    assert not differences(got, expected(name, variant=variant))


@PIPELINES
def test_batch_of_two(name: str) -> None:
    got, latents, _ = watched(name, variant="batch")
    assert len(latents) == 2
    one = expected(name)
    if name == "mochi":  # an op a sample: [uncond, uncond, cond, cond], each of its own length
        assert [s.index for s in got[:4]] == [0, 1, 2, 3]
        assert [s.q[0] for s in got] == [1] * len(got)
        assert len({s.q[2] for s in got}) == 4
        assert all(s.text == Span(s.grid.tokens, s.q[2]) for s in got if s.grid)
        return
    assert [(s.site, s.kind, s.layer, s.mask, s.grid, s.step, s.total, s.branch, s.index) for s in got] == [
        (s.site, s.kind, s.layer, s.mask, s.grid, s.step, s.total, s.branch, s.index) for s in one
    ] or name == "qwenimage"
    assert [s.q[0] for s in got] == [2 * s.q[0] for s in one]
    for s in got:  # the text is as long as the batch's longest
        if s.kind == "joint":
            assert s.text is not None
            assert len(s.text) == s.q[2] - s.grid.tokens
        if s.visible is not None and name in BATCH_WORDS:
            assert len(s.visible) == s.q[0]
            assert len(set(s.visible)) > 1, "samples differ in length"


def _pixels(name: str) -> tuple[dict[str, int], dict[str, Grid]]:
    """Another size, twice as high, half as wide plus a bit, and what grids that gives by the default one's ratio."""
    entry = tiny.PIPELINES[name]
    call = entry.call
    height, width = 2 * call["height"], call["width"] * 2 // 3 if call["width"] % 3 == 0 else call["width"] // 2
    size = {"height": height, "width": width}
    grids = {}
    for site in entry.expected.sites:
        if site.grid is not None:
            f, h, w = site.grid
            grids[site.name] = Grid(f, h * 2, w * width // call["width"])
    return size, grids


@PIPELINES
def test_another_resolution(name: str) -> None:
    size, grids = _pixels(name)
    got, _, _ = watched(name, **size)
    assert not differences(got, expected(name, sizes=grids))


@pytest.mark.parametrize("name", [n for n, e in tiny.PIPELINES.items() if e.video])
def test_another_number_of_frames(name: str) -> None:
    frames = {"mochi": 13, "ltx": 17}.get(name, 17)
    base = tiny.PIPELINES[name].expected.sites[-1].grid[0]
    got, _, _ = watched(name, num_frames=frames)
    latent = {s.grid.frames for s in got if s.grid}
    wanted = {2: 3, 3: 5}[base]
    assert latent == {wanted}
    for s in got:
        if s.kind == "joint":
            assert s.q[2] == s.grid.tokens + len(s.text)


@pytest.mark.parametrize("name", ["sd15", "mochi", "qwenimage"])
def test_calls_of_different_kinds_under_one_patch(name: str) -> None:
    """Guidance, none, and guidance again: nothing of one call is told in the next."""
    entry, pipe, watch = tiny.PIPELINES[name], built(name), Watch()
    with patchkit.apply(pipe, watch):
        for variant in (None, "no_cfg", None):
            watch.seen.clear()
            tiny.run(entry, pipe, variant=variant)
            assert not differences(watch.seen, expected(name, variant=variant))


def test_odd_latents_of_a_unet() -> None:
    """A level halves an odd side rounding up."""
    unet, watch = tiny.PIPELINES["sd15"].build().unet, Watch()
    with patchkit.apply(unet, watch), torch.no_grad():
        unet(torch.randn(1, 4, 17, 23), 1, torch.randn(1, 77, 32))
    grids = {s.site.split(".attentions")[0]: s.grid for s in watch.seen if s.kind == "self"}
    assert grids == {
        "down_blocks.0": Grid(1, 17, 23),
        "down_blocks.1": Grid(1, 9, 12),
        "mid_block": Grid(1, 9, 12),
        "up_blocks.0": Grid(1, 9, 12),
        "up_blocks.1": Grid(1, 17, 23),
    }
    assert {(s.component, s.step, s.total, s.branch) for s in watch.seen} == {("model", 0, None, "single")}


def test_six_steps_split_over_two_denoisers() -> None:
    got, _, _ = watched("wan22", steps=6)
    steps = {c: sorted({s.step for s in got if s.component == c}) for c in ("transformer", "transformer_2")}
    assert sorted(steps["transformer"] + steps["transformer_2"]) == list(range(6))
    assert steps["transformer"][-1] < steps["transformer_2"][0]
    assert {s.total for s in got} == {6}


def test_a_pass_of_one_half_in_the_same_step() -> None:
    """Skip-layer guidance runs the conditional half once more: another branch, with a state of its own."""
    options = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    got, _, _ = watched("sd35", steps=4, **options)
    calls = list(dict.fromkeys((s.step, s.branch, s.q[0]) for s in got))
    assert calls == [(0, "batched", 2), *[(i, b, n) for i in (1, 2, 3) for b, n in (("batched", 2), ("single", 1))]]


def test_repeated_passes_of_a_step_have_names_of_their_own() -> None:
    """Passes that nobody names are numbered, and the numbers begin anew at each step."""
    pipe, watch = tiny.PIPELINES["sd3"].build(), Watch()
    with patchkit.apply(pipe, watch):
        model = pipe.transformer
        pipe.scheduler.set_timesteps(2)
        inputs = {
            "hidden_states": torch.randn(1, 4, 16, 16),
            "encoder_hidden_states": torch.randn(1, 93, 64),
            "pooled_projections": torch.randn(1, 64),
        }
        with torch.no_grad():
            for t in pipe.scheduler.timesteps:
                for _ in range(3):
                    out = model(**inputs, timestep=t[None], return_dict=False)[0]
                pipe.scheduler.step(out, t, inputs["hidden_states"])
    names = [(s.step, s.total, s.branch) for s in watch.seen if s.layer == 0]
    assert names == [(i, 2, b) for i in range(2) for b in ("single", "single#1", "single#2")]


def test_linear_attention_is_left_and_named() -> None:
    plan = patchkit.plan(built("sana"), Watch()).to_dict()["recipes"][0]
    assert len(plan["matched"]) == 2
    assert [left["site"] for left in plan["left"]] == [f"transformer.transformer_blocks.{i}.attn1" for i in range(2)]
    assert "linear attention" in plan["left"][0]["reason"]


def test_picture_to_picture_counts_the_steps_that_run() -> None:
    """It runs the last part of the timesteps only, and says so; a later full run must not be told the same."""
    from diffusers import StableDiffusionImg2ImgPipeline

    entry = tiny.PIPELINES["sd15"]
    pipe = StableDiffusionImg2ImgPipeline(**entry.build().components)
    pipe.set_progress_bar_config(disable=True)
    picture = torch.zeros(1, 3, 32, 48)
    watch = Watch()
    with patchkit.apply(pipe, watch):
        for strength, steps in ((0.5, 2), (1.0, 4), (0.5, 2)):
            watch.seen.clear()
            pipe("a", image=picture, strength=strength, num_inference_steps=4, output_type="latent")
            assert {(s.step, s.total) for s in watch.seen} == {(i, steps) for i in range(steps)}


def test_image_to_video_cross_attention_has_two_ops() -> None:
    """Wan's image-to-video cross-attention reads the image first, then the text."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=64,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
        image_dim=8,
        added_kv_proj_dim=24,
    ).eval()
    inputs = {
        "hidden_states": torch.randn(1, 16, 2, 4, 6),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 512, 32),
        "encoder_hidden_states_image": torch.randn(1, 7, 8),
        "return_dict": False,
    }
    watch = Watch(targets=["attn2"])
    with torch.no_grad():
        plain = model(**inputs)[0]
        with patchkit.apply(model, watch):
            assert torch.equal(model(**inputs)[0], plain)
    assert [(s.index, s.k[2], s.text) for s in watch.seen] == [(0, 7, None), (1, 512, Span(0, 512))] * 2
    assert {s.grid for s in watch.seen} == {Grid(2, 2, 3)}
