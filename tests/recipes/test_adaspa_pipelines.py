"""AdaSpa on whole pipelines of the real classes."""

from __future__ import annotations

import functools

import pytest
import tiny
import torch

import patchkit
from patchkit.recipes.adaspa import Geometry

# More tokens than the tiny pipelines' own sizes have, so that there are blocks to choose from.
SIZES = {
    "cogvideox": {"height": 64, "width": 96},
    "hunyuan": {"height": 128, "width": 96},
    "wan21": {"height": 128, "width": 96},
    "wan22": {"height": 128, "width": 96},
    "mochi": {"height": 128, "width": 96},
    "ltx": {"height": 32, "width": 96},
    "flux": {"height": 32, "width": 48},
    "sd3": {"height": 64, "width": 48},
    "qwenimage": {"height": 64, "width": 48},
}
STEPS = 5  # one dense, a search behind it, another search at the third
SMALL = {"min_tokens": 0, "block_size": 16}


@functools.cache
def pipeline(name):
    return tiny.PIPELINES[name].build()


def run(name, steps=STEPS, **extra):
    return tiny.run(tiny.PIPELINES[name], pipeline(name), steps=steps, **{**SIZES[name], **extra})


@functools.cache
def reference(name):
    return run(name)


def rows_of(patch):
    return patch.report().to_dict()["recipes"][0]["rows"]


@pytest.mark.parametrize("name", SIZES)
def test_everything_kept_equals_dense_and_removal_is_exact(name):
    wanted = reference(name)
    with patchkit.apply(pipeline(name), "adaspa", density=1.0, **SMALL) as patch:
        out = run(name)
        report = patch.report().to_dict()["recipes"][0]
    assert torch.allclose(out, wanted, atol=1e-5, rtol=1e-4)
    assert report["counts"]["sparse"] > 0
    assert report["means"]["actual_density"] == pytest.approx(1.0)
    assert torch.equal(run(name), wanted)


@pytest.mark.parametrize("name", SIZES)
def test_schedule_in_every_site_and_branch(name):
    wanted = reference(name)
    with patchkit.apply(pipeline(name), "adaspa", density=0.25, **SMALL) as patch:
        first, second = run(name), run(name)
        rows = rows_of(patch)
    assert torch.equal(first, second)  # the second run began anew
    assert not torch.allclose(first, wanted, atol=1e-4)
    assert rows
    for row in rows:
        steps = row["calls"]  # wan22: each of its two denoisers runs a part of the five
        assert row["counts"]["fused_search"] == 1, row
        assert row["counts"]["sparse"] == steps - 1
        assert sum(row["dense"].values()) == 1
        assert max(map(max, row["values"]["actual_density"])) <= 1
        assert row["values"]["lse_bytes"] == 0
    if name != "wan22":
        assert all(row["calls"] == STEPS and row["counts"]["cached_search"] == 1 for row in rows)


@pytest.mark.parametrize("name", SIZES)
def test_dense_steps_have_the_bits_of_the_unpatched_pipeline(name):
    """Latents after each step: three dense ones, the last with a search behind it, then sparse ones."""
    seen = {}

    def latents(key):
        def callback(pipe, step, timestep, kwargs):
            seen.setdefault(key, []).append(kwargs["latents"].clone())
            return kwargs

        return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents"]}

    run(name, **latents("plain"))
    with patchkit.apply(pipeline(name), "adaspa", density=0.25, warmup_steps=3, **SMALL):
        run(name, **latents("patched"))
    equal = [torch.equal(a, b) for a, b in zip(seen["plain"], seen["patched"], strict=True)]
    # Wan 2.2 changes to its second denoiser after step 2: its first call is a search and dense as well
    assert equal == [True, True, True, name == "wan22", False]


def test_guidance_branches_have_their_own_state():
    with patchkit.apply(pipeline("wan21"), "adaspa", density=0.25, **SMALL) as patch:
        run("wan21")
        rows = rows_of(patch)
    assert {row["branch"] for row in rows} == {"cond", "uncond"}
    assert len({(row["site"], row["branch"]) for row in rows}) == 4


def test_second_transformer_searches_on_its_first_call():
    with patchkit.apply(pipeline("wan22"), "adaspa", density=0.25, **SMALL) as patch:
        run("wan22")
        rows = [r for r in rows_of(patch) if r["component"] == "transformer_2"]
    assert rows
    for row in rows:
        assert row["dense"] == {"no mask yet in the sparse phase: first search": 1}
        assert row["counts"]["fused_search"] == 1
        assert row["counts"]["sparse"] == row["calls"] - 1


def test_fifty_steps():
    with patchkit.apply(pipeline("wan21"), "adaspa", layers=0, **SMALL) as patch:
        run("wan21", steps=50, height=64, width=96)
        rows = rows_of(patch)
    assert len(rows) == 2
    for row in rows:
        assert row["counts"] == {"searches": 2, "fused_search": 1, "cached_search": 1, "sparse": 40}
        assert row["dense"] == {"warm-up": 10}


def test_another_size_in_the_next_run():
    with patchkit.apply(pipeline("wan21"), "adaspa", density=0.25, **SMALL):
        run("wan21")
        again = run("wan21", height=64)
    with patchkit.apply(pipeline("wan21"), "adaspa", density=0.25, **SMALL):
        fresh = run("wan21", height=64)
    assert torch.equal(again, fresh)


def test_steps_window_that_starts_late_searches_there():
    with patchkit.apply(pipeline("wan21"), "adaspa", density=0.25, steps=(3, 5), **SMALL) as patch:
        run("wan21")
        rows = rows_of(patch)
    for row in rows:
        assert row["calls"] == 2
        assert row["dense"] == {"no mask yet in the sparse phase: first search": 1}
        assert row["counts"] == {"searches": 1, "fused_search": 1, "sparse": 1}


def test_cross_attention_and_refiners_are_left_and_named():
    wan = patchkit.plan(pipeline("wan21"), "adaspa").to_dict()["recipes"][0]
    assert {site.rpartition(".")[2] for site in wan["matched"]} == {"attn1"}
    assert all("cross attention" in entry["reason"] for entry in wan["left"])
    assert {entry["site"].rpartition(".")[2] for entry in wan["left"]} == {"attn2"}
    hunyuan = patchkit.plan(pipeline("hunyuan"), "adaspa").to_dict()["recipes"][0]
    assert hunyuan["matched"]
    assert not any("context_embedder" in site for site in hunyuan["matched"])


def test_cross_attention_keeps_its_own_processors():
    pipe = pipeline("wan21")
    before = {n: m.processor for n, m in pipe.transformer.named_modules() if hasattr(m, "processor")}
    with patchkit.apply(pipe, "adaspa", density=0.25, **SMALL) as patch:
        during = {n: m.processor for n, m in pipe.transformer.named_modules() if hasattr(m, "processor")}
        run("wan21")
        assert all(row["site"].endswith("attn1") for row in rows_of(patch))
    changed = {n for n in before if before[n] is not during[n]}
    assert changed == {n for n in before if n.endswith("attn1")}


def test_short_sequences_are_reported_and_exact():
    wanted = reference("cogvideox")
    with patchkit.apply(pipeline("cogvideox"), "adaspa") as patch:
        assert torch.equal(run("cogvideox"), wanted)
        assert "below min_tokens" in str(patch.report())


def test_short_sequences_that_min_tokens_admits_are_called_slow_at_the_head_of_the_report():
    with patchkit.apply(pipeline("cogvideox"), "adaspa", density=0.25, **SMALL) as patch:
        run("cogvideox")
        report = patch.report()
    sites = report["recipes"][0]["sites"]
    first, second, *_ = str(report).splitlines()
    assert first.startswith("patch on")
    assert second.startswith(f"NOTE: adaspa: slower than dense expected at {sites} of {sites} sites: ")
    assert "too short to gain over dense" in second


@pytest.mark.parametrize("name", ["hunyuan", "qwenimage"])
@pytest.mark.parametrize("density", [0.25, 1.0])
def test_padded_prompts_stay_sparse(name, density, monkeypatch):
    """Two prompts of unlike length: text is padded at the end of the sequence, or between its start and the image."""
    lengths = set()
    find = Geometry.of

    def listening(*args):
        found = find(*args)
        lengths.add(found.lengths)
        return found

    monkeypatch.setattr(Geometry, "of", listening)
    prompts = {"prompt": ["a red circle", "a cat"]}
    if name == "qwenimage":
        prompts["negative_prompt"] = ["", "blurred and grey"]
    wanted = run(name, **prompts)
    with patchkit.apply(pipeline(name), "adaspa", density=density, **SMALL) as patch:
        out = run(name, **prompts)
        rows = rows_of(patch)
    assert any(found is not None and len(set(found)) == 2 for found in lengths)
    assert torch.allclose(out, wanted, atol=1e-5, rtol=1e-4) == (density == 1.0)
    for row in rows:
        assert row["counts"]["sparse"] == STEPS - 1
        assert row["dense"] == {"warm-up": 1}


def test_a_model_without_a_pipeline_says_that_it_has_no_clock():
    pipe = pipeline("wan21")
    with patchkit.apply(pipe.transformer, "adaspa", **SMALL) as patch:
        run("wan21")
        dense = patch.report().to_dict()["recipes"][0]["dense"]
    assert any("run unknown" in reason or "no step clock" in reason for reason in dense)


def test_compiled_denoiser_gives_the_same_numbers():
    with patchkit.apply(pipeline("wan21"), "adaspa", density=0.25, **SMALL):
        wanted = run("wan21")
    pipe = tiny.PIPELINES["wan21"].build()
    pipe.transformer.compile(backend="eager", fullgraph=True)
    with patchkit.apply(pipe, "adaspa", density=0.25, **SMALL) as patch:
        out = tiny.run(tiny.PIPELINES["wan21"], pipe, steps=STEPS, **SIZES["wan21"])
        counts = rows_of(patch)[0]["counts"]
    assert counts == {"searches": 2, "fused_search": 1, "cached_search": 1, "sparse": STEPS - 1}
    assert torch.allclose(out, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    pipe = tiny.PIPELINES["cogvideox"].build().to(dtype)
    entry = tiny.PIPELINES["cogvideox"]
    wanted = tiny.run(entry, pipe, steps=STEPS, **SIZES["cogvideox"])
    with patchkit.apply(pipe, "adaspa", density=1.0, **SMALL):
        out = tiny.run(entry, pipe, steps=STEPS, **SIZES["cogvideox"])
    assert out.dtype == wanted.dtype
    assert torch.allclose(out.float(), wanted.float(), atol=0.05, rtol=0.05)
