"""DiTCtrl on whole CogVideoX pipelines, with positions added (2B) and turned (RoPE), against its formulas."""

from __future__ import annotations

import re
import warnings
import weakref
from typing import Any

import ditctrl_oracle as oracle
import pytest
import tiny
import torch
from ditctrl_tools import PROMPTS, SHORT, Inside, NoisyKeys, Pairwise, build, encoded, run, tokens
from fingerprint import fingerprint
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import patchkit
from patchkit import Conflict, InvalidOption, PatchkitError, UnsupportedModel
from patchkit.recipes.ditctrl import DiTCtrl, passes

MODELS = ("cogvideox2b", "cogvideox")
GUIDED = {**SHORT, "objects": "circle"}


def noise(entry: Any, frames: int, seed: int = 3) -> Tensor:
    return torch.randn(1, frames, 4, 4, 6, generator=torch.Generator().manual_seed(seed))


# --- the long video -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"objects": "circle"}, {"objects": "circle", "map": "avg"}])
@pytest.mark.parametrize("name", MODELS)
def test_long_video_is_that_of_the_formulas(name: str, options: dict[str, Any]) -> None:
    """Pairs of four samples, N x N maps, x0 blended after guidance, one solver step: DDIM and stochastic DPM."""
    entry, pipe = build(name)
    count, frames = oracle.frames(2, 1, 0, 3, 1)
    z, prompts = noise(entry, frames), ["a red circle", "a blu circle"]
    words = [tokens(pipe, p, "circle") for p in prompts]
    assert words[0] == words[1]
    state = oracle.State(layers=(2, 3), threshold=0.3, grid=(3, 2, 3), kind=options.get("map", "v2t"))
    embeds = [encoded(pipe, p) for p in prompts]
    expected = oracle.long_video(
        pipe,
        oracle.texts(embeds, 1, 0),
        torch.zeros_like(embeds[0]),
        z,
        length=3,
        overlap=1,
        steps=5,
        guidance=4.0,
        sharing=lambda i: i in (1, 2),
        state=state,
        tokens=[words[0]] * count if options else None,
        generator=torch.Generator().manual_seed(9),
    )
    found = run(
        entry,
        pipe,
        DiTCtrl(**{**SHORT, **options}),
        5,
        latents=z,
        guidance_scale=4.0,
        prompt=prompts,
        generator=torch.Generator().manual_seed(9),
    )
    assert found.shape == expected.shape
    assert (found - expected).norm() / expected.norm() < 1e-4
    without = run(
        entry,
        pipe,
        DiTCtrl(**{**SHORT, "kv_steps": None}),
        5,
        latents=z,
        guidance_scale=4.0,
        prompt=prompts,
        generator=torch.Generator().manual_seed(9),
    )
    assert (found - without).norm() / expected.norm() > 1e-2  # and it could have failed


@pytest.mark.parametrize("options", [{}, {"objects": "circle"}, {"kv_layers": "0-"}, {"kv_layers": "1,3"}])
@pytest.mark.parametrize("name", MODELS)
def test_computing_segments_once_changes_no_bit(name: str, options: dict[str, Any]) -> None:
    entry, pipe = build(name)
    given = {**SHORT, **options}
    prompt = ["a red circle", "a blu circle", "a gre circle"]
    assert torch.equal(
        run(entry, pipe, DiTCtrl(**given), prompt=prompt), run(entry, pipe, Pairwise(**given), prompt=prompt)
    )


def test_block_forwards_are_as_counted_by_hand() -> None:
    """S = 5: 5 segments outside the window; inside, 3 inner ones pass the last 2 of 4 blocks a second time."""
    entry, pipe = build()
    with patchkit.apply(pipe, DiTCtrl(**SHORT)) as patch:
        tiny.run(entry, pipe, steps=4, prompt=["a re", "a bl", "a gr"], negative_prompt=None)
        [report] = patch.report()["recipes"]
    counts = report["counts"]
    assert counts["block forwards"] == 2 * 5 * 4 + 2 * (5 * 4 + 3 * 2)
    assert counts["block forwards without sharing"] == 4 * 8 * 4
    assert counts["shared blocks"] == 2 * 3 * 2
    assert counts["shared ops"] == 2 * 2 * 4  # |ST| |LY| (S - 1), both halves of guidance in one op
    [share] = [v for k, v in report["figures"].items() if "share of" in k]
    assert share == pytest.approx(92 / 128)


def test_default_window_of_steps_is_half_open() -> None:
    entry, pipe = build(layers=2)
    inside = Inside()
    run(entry, pipe, [DiTCtrl(overlap=1, transitions=0), inside], 50)
    assert sorted({step for step, part, *_ in inside.forwards if part.endswith("target")}) == list(range(2, 25))


@pytest.mark.parametrize("name", MODELS)
def test_segments_that_do_not_touch_are_isolated_videos(name: str) -> None:
    entry, pipe = build(name)
    pipe.scheduler = build("cogvideox2b")[1].scheduler  # deterministic
    z = noise(entry, 6)
    prompts = PROMPTS[:2]
    recipe = DiTCtrl(overlap=0, transitions=0, kv_steps=None)
    found = run(entry, pipe, recipe, latents=z, prompt=prompts)
    for i, prompt in enumerate(prompts):
        c = encoded(pipe, prompt)
        alone = tiny.run(
            entry,
            pipe,
            steps=4,
            prompt=None,
            negative_prompt=None,
            prompt_embeds=c,
            negative_prompt_embeds=torch.zeros_like(c),
            latents=z[:, 3 * i : 3 * i + 3],
        )
        assert torch.equal(found[:, 3 * i : 3 * i + 3], alone)


@pytest.mark.parametrize("prompt", ["a red circle", ["a red circle"]])
def test_one_segment_is_the_pipelines_own_call(prompt: Any) -> None:
    entry, pipe = build()
    before = tiny.run(entry, pipe, steps=3)
    assert torch.equal(run(entry, pipe, "ditctrl", 3, prompt=prompt, negative_prompt="blur"), before)


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_left_behind(name: str) -> None:
    entry, pipe = build(name)
    out, before = tiny.run(entry, pipe, steps=2), fingerprint(pipe)
    patch = patchkit.apply(pipe, DiTCtrl(**GUIDED))
    long = tiny.run(entry, pipe, steps=4, prompt=["a red circle", "a blu circle"], negative_prompt=None)
    assert long.shape[1] == 7
    assert fingerprint(pipe) != before
    patch.remove()
    assert fingerprint(pipe) == before
    assert torch.equal(tiny.run(entry, pipe, steps=2), out)


@pytest.mark.parametrize("variant", [None, "no_cfg"])
@pytest.mark.parametrize("name", MODELS)
def test_equal_segments_give_equal_tiles_wherever_they_stand(name: str, variant: str | None) -> None:
    """Positions begin anew; and between equal clips shared keys are their own."""
    entry, pipe = build(name)
    part = noise(entry, 3)
    z = torch.cat([part] * 3, 1)
    inside = Inside()
    recipe = DiTCtrl(**{**SHORT, "overlap": 0, "kv_steps": (0, 2)})
    run(entry, pipe, [recipe, inside], 2, latents=z, prompt=["a red circle"] * 2, variant=variant)
    first = [out for step, _, _, out in inside.forwards if step == 0]  # later the solver's noise tells them apart
    assert len(first) == 4  # source 0, source 1, target 1, target 2
    for other in first[1:]:
        torch.testing.assert_close(other, first[0], atol=1e-5, rtol=1e-5)


# --- sharing --------------------------------------------------------------------------------------------------


def test_targets_own_keys_play_no_part_and_sources_know_no_target() -> None:
    entry, pipe = build()
    z = noise(entry, 7)
    recipe = DiTCtrl(**SHORT)
    plain = run(entry, pipe, recipe, latents=z)
    assert torch.equal(plain, run(entry, pipe, [NoisyKeys(of=[2, 3]), recipe], latents=z))
    other = DiTCtrl(**{**SHORT, "kv_layers": "1,3"})  # block 2 then has the target's own keys
    assert not torch.equal(run(entry, pipe, other, latents=z), run(entry, pipe, [NoisyKeys(of=[2]), other], latents=z))
    seen = []
    for second in ("a bl circle", "no such thing"):
        inside = Inside()
        run(entry, pipe, [recipe, inside], latents=z, prompt=["a red circle", second])
        seen.append([out for step, part, _, out in inside.forwards if step == 0 and part == "0"])
    assert torch.equal(seen[0][0], seen[1][0])


def test_text_keys_are_shared_with_the_videos() -> None:
    entry, pipe = build()
    inside = Inside()
    run(entry, pipe, [DiTCtrl(**SHORT), inside])
    sources = {(s, p, layer): c for s, p, layer, c in inside.ops}
    checked = 0
    for step, part, layer, call in inside.ops:
        if part.endswith("target") and layer >= 2:
            before = sources[step, str(int(part.split("-")[0]) - 1), layer] if part[0] != "0" else None
            assert before is not None
            assert torch.equal(call.k, before.k)
            assert torch.equal(call.v, before.v)
            assert call.k.shape[2] == 16 + 18
            checked += 1
    assert checked == 2 * 2 * 2


def test_masks_are_of_the_target_before_sharing_and_of_this_forward_alone() -> None:
    """Averaged over the layers so far, from own keys, conditional samples for both halves; anew at every forward."""
    entry, pipe = build()
    prompts, z = ["a red circle", "a blu circle"], noise(entry, 7)
    inside = Inside()
    run(entry, pipe, [DiTCtrl(**{**GUIDED, "transitions": 0}), inside], latents=z[:, :5], prompt=prompts)
    [rows] = {
        tuple(c.q.shape[2] for s, p, layer, c in inside.ops if s == step and p == "1-target" and layer == 2)
        for step in (1,)
    }
    assert rows[0] == 16  # the words first, then the object, then the rest; each with both halves of guidance
    assert sum(rows) == 16 + 18
    assert all(c.q.shape[0] == 2 for s, p, layer, c in inside.ops if p == "1-target")


@pytest.mark.parametrize("threshold", [0.0, 1.01])
def test_masks_that_separate_nothing_are_plain_sharing(threshold: float) -> None:
    entry, pipe = build()
    prompts = ["a red circle", "a blu circle"]
    guided = run(entry, pipe, DiTCtrl(**{**GUIDED, "threshold": threshold}), prompt=prompts)
    torch.testing.assert_close(guided, run(entry, pipe, DiTCtrl(**SHORT), prompt=prompts), atol=1e-4, rtol=1e-4)
    real = run(entry, pipe, DiTCtrl(**GUIDED), prompt=prompts)
    assert (real - guided).norm() / guided.norm() > 1e-3


def test_half_precision_runs_and_stays_near() -> None:
    entry, pipe = build()
    full = run(entry, pipe, DiTCtrl(**SHORT))
    half = run(entry, pipe.to(torch.bfloat16), DiTCtrl(**SHORT))
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).norm() / full.norm() < 0.1


class Sizes(TorchDispatchMode):
    """The largest tensor that any operation made."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.numel())
        return out


def test_no_map_of_all_tokens_is_made() -> None:
    entry, pipe = build()
    with Sizes() as sizes:
        run(entry, pipe, DiTCtrl(**GUIDED), prompt=["a red circle", "a blu circle"], height=160, width=160)
    tokens_of = 16 + 3 * 10 * 10
    assert sizes.largest < 2 * tokens_of**2  # two heads


def test_keys_of_one_clip_at_a_time_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory does not grow with the length of the video, but for its latents."""
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most: dict[int, int] = {}

    class Counted(passes.Source):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            alive.add(self)
            most[count] = max(most.get(count, 0), len(alive))

    monkeypatch.setattr(passes, "Source", Counted)
    entry, pipe = build()
    for count in (2, 4):
        run(entry, pipe, DiTCtrl(**SHORT), prompt=["a re"] * count)
        assert not alive
    assert most == {2: 4, 4: 4}  # of two clips, in two layers


# --- edits ----------------------------------------------------------------------------------------------------


def alone(entry: Any, pipe: Any, prompt: str, **call: Any) -> Tensor:
    c = encoded(pipe, prompt)
    given = {"prompt": None, "negative_prompt": None, "prompt_embeds": c, **call}
    return tiny.run(entry, pipe, steps=4, negative_prompt_embeds=torch.zeros_like(c), **given)


@pytest.mark.parametrize("variant", [None, "no_cfg"])
@pytest.mark.parametrize("name", MODELS)
def test_swap_gives_the_source_as_it_is_alone_and_its_edit(name: str, variant: str | None) -> None:
    """With the noise of a single video, and with the solver's own noise (DPM) the same in both."""
    entry, pipe = build(name)
    prompts = ["a red circle", "a blu circle"]
    edits = {}
    for label, options in {"guided": GUIDED, "plain": SHORT, "apart": {**SHORT, "kv_steps": None}}.items():
        both = run(entry, pipe, DiTCtrl(**{**options, "mode": "swap"}), prompt=prompts, variant=variant)
        assert both.shape[0] == 2
        if variant is None:
            assert torch.equal(both[:1], alone(entry, pipe, prompts[0]))
        edits[label] = both[1:]
    if variant is None:
        assert torch.equal(edits["apart"], alone(entry, pipe, prompts[1]))
    assert (edits["guided"] - edits["plain"]).norm() > 1e-3
    assert (edits["apart"] - edits["plain"]).norm() > 1e-3


def test_swap_from_given_noise_and_without_a_generator() -> None:
    entry, pipe = build("cogvideox")
    z = noise(entry, 3)
    same = run(entry, pipe, DiTCtrl(**{**SHORT, "mode": "swap"}), prompt=["a re"] * 2, latents=z, generator=None)
    torch.testing.assert_close(same[:1], same[1:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_reweighting_leaves_the_source_and_does_what_its_factor_says(name: str) -> None:
    entry, pipe = build(name)
    source, edits = alone(entry, pipe, "a red circle"), {}
    for factor in (1.0, 0.0, 2.0):
        recipe = DiTCtrl(mode="reweight", reweight={"red": factor})
        with patchkit.apply(pipe, recipe) as patch:
            both = tiny.run(entry, pipe, steps=4, prompt="a red circle", negative_prompt=None)
            counts = patch.report()["recipes"][0]["counts"]
        assert torch.equal(both[:1], source)
        assert counts["reweighted ops"] == 4 * 4  # every layer, every step
        assert counts["shared ops"] == 2 * 4  # in the first two steps, every layer
        edits[factor] = both[1:]
    torch.testing.assert_close(edits[1.0], source, atol=1e-4, rtol=1e-4)
    assert (edits[0.0] - source).norm() / source.norm() > 1e-3
    assert (edits[2.0] - edits[0.0]).norm() / source.norm() > 1e-3


@pytest.mark.parametrize(
    ("options", "prompt", "words_of_it"),
    [
        ({"mode": "swap"}, "a re", "give prompt=\\[source, target\\]"),
        ({"mode": "swap"}, ["a", "b", "c"], "3 prompts"),
        ({"mode": "reweight", "reweight": {"re": 0.0}}, ["a re", "b re"], "2 prompts"),
        ({"mode": "reweight", "reweight": {"blue": 0.0}}, "a re", "no word 'blue'"),
        ({"mode": "reweight", "reweight": {"red": 0.0, "red circle": 2.0}}, "a red circle", "shares a token"),
    ],
)
def test_edits_that_cannot_be_are_refused(options: dict[str, Any], prompt: Any, words_of_it: str) -> None:
    entry, pipe = build()
    with pytest.raises(InvalidOption, match=words_of_it):
        run(entry, pipe, DiTCtrl(**options), prompt=prompt)


# --- bad input ------------------------------------------------------------------------------------------------


class Silent(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} was computed")


@pytest.mark.parametrize(
    ("call", "options", "words_of_it"),
    [
        ({"prompt": []}, {}, "no list of prompts"),
        ({"prompt": ["a circle", " "]}, {}, "prompt 1 of 2 is empty"),
        ({"prompt": ["a circle", 3]}, {}, "no list of prompts"),
        ({"prompt": None, "prompt_embeds": 1}, {}, "as words"),
        ({"num_frames": 10}, {}, "10 frames"),
        ({"num_frames": 0}, {}, "0 frames"),
        ({}, {"overlap": 3}, "overlap of 3 latent frames, and segments of 3"),
        ({}, {"objects": "square"}, "no word 'square'"),
        ({}, {"objects": ["circle"]}, "1 words for 2 prompts"),
        ({"objects": ["circle", "ci", "rcle"]}, {}, "3 words for 2 prompts"),
        ({"objects": 7}, {}, "names no objects"),
        ({"prompt": ["a circle", "a red circle"]}, {"objects": "circle"}, "token by token"),
        ({"negative_prompt": "blur"}, {}, "zero_uncond"),
        ({"negative_prompt": ["x", "y"]}, {"zero_uncond": False}, "one text"),
        ({"latents": torch.zeros(1, 4, 4, 4, 6)}, {}, "7 latent frames"),
        ({"latents": torch.zeros(2, 7, 4, 4, 6)}, {}, "2 videos"),
        ({"num_videos_per_prompt": 2}, {}, "one video a call"),
        ({"generator": [torch.Generator(), torch.Generator()]}, {}, "2 generators"),
    ],
)
def test_bad_input_is_refused_before_anything_is_computed(
    call: dict[str, Any], options: dict[str, Any], words_of_it: str
) -> None:
    entry, pipe = build()
    given = {**entry.arguments(), "prompt": ["a red circle", "a blu circle"], "negative_prompt": None, **call}
    with patchkit.apply(pipe, DiTCtrl(**{**SHORT, **options})), Silent(), pytest.raises(InvalidOption) as caught:
        pipe(**given, num_inference_steps=2)
    assert re.search(words_of_it, str(caught.value))


def test_objects_at_other_places_are_fine_without_mixtures_or_masks() -> None:
    entry, pipe = build()
    prompt = ["a circle", "a red circle"]
    for options in ({"transitions": 0}, {"mask_guided": False}):
        run(entry, pipe, DiTCtrl(**{**GUIDED, **options}), prompt=prompt)


def test_without_objects_the_report_says_so() -> None:
    entry, pipe = build()
    with patchkit.apply(pipe, DiTCtrl(**SHORT)) as patch:
        tiny.run(entry, pipe, steps=2, prompt=PROMPTS[:2], negative_prompt=None)
        assert any("no objects were named" in text for text in patch.report().cautions())
        tiny.run(entry, pipe, steps=2, prompt=["a red circle", "a blu circle"], negative_prompt=None, objects="circle")
        assert not patch.report().cautions()


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_other_pipelines_are_refused_by_name(name: str) -> None:
    pipe = tiny.PIPELINES[name].build()
    with pytest.raises(UnsupportedModel, match=type(pipe).__name__):
        patchkit.apply(pipe, "ditctrl")
    with pytest.raises(UnsupportedModel, match="pipeline"):
        patchkit.apply(pipe.transformer, "ditctrl")


def test_layers_that_are_not_there_are_refused() -> None:
    _, pipe = build()
    with pytest.raises(InvalidOption, match="kv_layers"):
        patchkit.apply(pipe, "ditctrl", kv_layers="7")


def test_step_caches_are_refused() -> None:
    from diffusers import FirstBlockCacheConfig

    entry, pipe = build()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with patchkit.apply(pipe, DiTCtrl(**SHORT)), pytest.raises(Conflict, match="disable_cache"):
        tiny.run(entry, pipe, steps=2, prompt=PROMPTS[:2], negative_prompt=None)


def test_block_sparse_attention_works_inside_with_a_state_for_each_segment_and_role() -> None:
    entry, pipe = build()
    adaspa = patchkit.recipes()["adaspa"]
    sparse = {"warmup_steps": 1, "min_tokens": 0, "block_size": 4, "search_steps": []}
    given = {"steps": 5, "prompt": ["a red circle", "a blu circle"]}
    for options in (SHORT, GUIDED):
        alone = run(entry, pipe, DiTCtrl(**options), **given)
        everything = run(entry, pipe, [adaspa(density=1.0, **sparse), DiTCtrl(**options)], **given)
        torch.testing.assert_close(everything, alone, atol=1e-3, rtol=1e-3)
        with patchkit.apply(pipe, [DiTCtrl(**options), adaspa(density=0.4, **sparse)]) as patch:
            out = tiny.run(entry, pipe, negative_prompt=None, **given)
            report = patch.report()["recipes"][1]
        assert torch.isfinite(out).all()
        assert (out - alone).norm() / alone.norm() > 1e-3
        assert report["counts"]["sparse"] > 0
        # each search once: three segments in every layer, the last as target in those before the first that shares keys
        # (its only forward then), and two targets in those that do
        guided = options is GUIDED
        assert report["counts"]["searches"] == 3 * 4 + 2 + (0 if guided else 2 * 2)
        assert ("queries and keys differ in number" in report["dense"]) == guided


def test_processors_that_were_replaced_meanwhile_are_noticed() -> None:
    entry, pipe = build()
    with patchkit.apply(pipe, DiTCtrl(**SHORT)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.fuse_qkv_projections()
        with pytest.raises(PatchkitError, match=r"attention of blocks \[2, 3\] did not come by"):
            tiny.run(entry, pipe, steps=4, prompt=PROMPTS[:2], negative_prompt=None)


def test_fused_projections_work_when_they_came_first() -> None:
    entry, pipe = build()
    plain = run(entry, pipe, DiTCtrl(**SHORT))
    pipe.fuse_qkv_projections()
    torch.testing.assert_close(run(entry, pipe, DiTCtrl(**SHORT)), plain, atol=1e-3, rtol=1e-3)


def test_an_error_in_the_run_leaves_no_state() -> None:
    entry, pipe = build()

    def stop(*_: Any) -> Any:
        raise RuntimeError("stop")

    with patchkit.apply(pipe, DiTCtrl(**SHORT)):
        with pytest.raises(RuntimeError, match="stop"):
            tiny.run(entry, pipe, steps=3, prompt=PROMPTS[:2], negative_prompt=None, callback_on_step_end=stop)
        plain = tiny.run(entry, pipe, steps=2)
    assert torch.equal(plain, tiny.run(entry, pipe, steps=2))


def test_positional_prompts_and_negative_texts() -> None:
    entry, pipe = build()
    with patchkit.apply(pipe, DiTCtrl(**SHORT, zero_uncond=False)):
        given = {n: v for n, v in entry.arguments().items() if n not in ("prompt", "negative_prompt")}
        outs = [
            pipe(
                PROMPTS[:2],
                negative,
                **given,
                num_inference_steps=2,
                return_dict=False,
                generator=torch.Generator().manual_seed(0),
            )[0]
            for negative in (None, "blur", "")
        ]
    assert torch.equal(outs[0], outs[2])
    assert not torch.equal(outs[0], outs[1])
