"""PARO on whole pipelines of the real classes: calibration, runs, refusals, composition."""

from __future__ import annotations

import dataclasses
import functools
import json

import pytest
import tiny
import torch

import patchkit
from patchkit.errors import Conflict, InvalidOption, NothingMatched, PatchkitError
from patchkit.recipes.paro import PermutePlan, PlanError, calibrate
from patchkit.recipes.paro.geometry import Geometry

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
    "sd35": {"height": 64, "width": 48},
}
STEPS = 4


@functools.cache
def pipeline(name):
    return tiny.PIPELINES[name].build()


def run(name, steps=STEPS, **extra):
    return tiny.run(tiny.PIPELINES[name], pipeline(name), steps=steps, **{**SIZES[name], **extra})


@functools.cache
def reference(name):
    return run(name)


def make_plan(name, density=0.4, prompts=tiny.PROMPT, **extra):
    entry = tiny.PIPELINES[name]
    call = {n: v for n, v in entry.arguments(**SIZES[name]).items() if n not in ("prompt", "output_type", "generator")}
    call = {n: v for n, v in call.items() if n not in extra}
    pipeline(name).set_progress_bar_config(disable=True)
    options = {"num_inference_steps": STEPS, "buckets": 2, "block_size": 16, "order_steps": 1} | extra
    return calibrate(pipeline(name), prompts, density, **options, **call)


@functools.cache
def plan_of(name):
    return make_plan(name)


def rows_of(patch):
    return patch.report().to_dict()["recipes"][0]["rows"]


def changed(plan, **facts):
    return dataclasses.replace(plan, facts=dataclasses.replace(plan.facts, **facts), path=None)


def complete(plan, **changes):
    """A plan that keeps everything, with all six orders among its heads."""
    L, H = plan.order.shape
    codes = (torch.arange(L * H) % (6 if plan.facts.grid[0] > 1 else 2)).view(L, H).to(torch.uint8)
    return PermutePlan.from_masks(changes.get("order", codes), torch.ones_like(plan.masks), plan.facts)


# --- oracle 1 and 13: density 1, removal --------------------------------------------------------------------


@pytest.mark.parametrize("name", SIZES)
def test_everything_kept_equals_dense_in_any_order_and_removal_is_exact(name):
    wanted, pipe = reference(name), pipeline(name)
    before = {n: m.processor for n, m in pipe.transformer.named_modules() if hasattr(m, "processor")}
    weights = [p.clone() for p in pipe.transformer.parameters()]
    with patchkit.apply(pipe, "paro", plan=complete(plan_of(name))) as patch:
        out = run(name)
        report = patch.report().to_dict()["recipes"][0]
    assert torch.allclose(out, wanted, atol=2e-5, rtol=1e-4)
    assert report["counts"]["sparse"] > 0
    assert not report["dense"]
    assert torch.equal(run(name), wanted)
    assert all(m.processor is before[n] for n, m in pipe.transformer.named_modules() if n in before)
    assert all(torch.equal(a, b) for a, b in zip(weights, pipe.transformer.parameters(), strict=True))


@pytest.mark.parametrize("name", SIZES)
def test_calibrated_plan_runs_sparse_in_every_site_and_branch(name):
    plan = plan_of(name)
    with patchkit.apply(pipeline(name), "paro", plan=plan) as patch:
        first, second = run(name), run(name)
        rows = rows_of(patch)
    assert torch.equal(first, second)
    assert bool(first.isfinite().all())
    assert not torch.allclose(first, reference(name), atol=1e-4)
    names = {row["component"] + "." + row["site"] for row in rows}
    assert names == set(plan.facts.sites)
    for row in rows:
        assert row["counts"]["sparse"] == row["calls"] > 0
        assert not row["dense"]
        assert max(row["values"]["density"]) <= 1
        assert 0 < min(row["values"]["kept_mass"]) <= 1


@pytest.mark.parametrize("name", ["wan21", "cogvideox"])
def test_masks_hit_the_density_by_layer(name):
    plan = plan_of(name)
    forced = 1 / plan.blocks
    assert plan.density.mean(-1).flatten().tolist() == pytest.approx([0.4] * plan.density[..., 0].numel(), abs=forced)
    assert bool(plan.masks.any(-1).all())
    assert plan.facts.masks == (0, 1)
    assert plan.facts.steps == STEPS


# --- the sparse op is what the plan says --------------------------------------------------------------------


def test_one_op_equals_masked_attention_in_the_order_of_each_head():
    """Oracles 3 and 4, through the pipeline: text rows are dense, image rows see the kept blocks and all text."""
    from patchkit import Recipe

    seen = []

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Spy(Recipe):
        name = "spy"

        def attend(self, call, next):
            out = next(call)
            if call.step == 0 and not seen:
                seen.append((call, out))
            return out

    plan = plan_of("cogvideox")
    with patchkit.apply(pipeline("cogvideox"), [Spy(), patchkit.registry.get("paro")(plan=plan)]):
        run("cogvideox")
    call, out = seen[0]
    geometry = Geometry.of(call, 16)
    n, first, last = call.q.shape[2], geometry.first, geometry.last
    for h in range(call.q.shape[1]):
        from patchkit.kernels.reorder import rows_of_order

        order = torch.arange(n)
        image = rows_of_order(int(plan.order[0, h]), tuple(call.grid)) + geometry.start
        order[geometry.start : geometry.start + geometry.grid.tokens] = image
        blocks = torch.ones(geometry.total, geometry.total, dtype=torch.bool)
        blocks[first:last, first:last] = plan.mask(0, 0)[h]
        mask = blocks.repeat_interleave(16, 0).repeat_interleave(16, 1)[:n, :n]
        q, k, v = (x[:, h, order] for x in (call.q, call.k, call.v))
        s = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))
        wanted = torch.empty_like(q)
        wanted[:, order] = s.softmax(-1) @ v
        assert torch.allclose(out[:, h], wanted, atol=1e-5)
    dense = torch.nn.functional.scaled_dot_product_attention(call.q, call.k, call.v)
    assert torch.allclose(out[:, :, : geometry.start], dense[:, :, : geometry.start], atol=1e-5)
    assert not torch.allclose(out, dense, atol=1e-4)


def test_a_batch_of_two_is_two_batches_of_one():
    """Oracle 11: the two halves of a guided batch share the masks."""
    with patchkit.apply(pipeline("wan21"), "paro", plan=plan_of("wan21")) as patch:
        run("wan21")
        rows = rows_of(patch)
    by_branch = {row["branch"]: row["values"]["density"] for row in rows if row["layer"] == 0}
    assert set(by_branch) == {"cond", "uncond"}
    assert by_branch["cond"] == by_branch["uncond"]


def test_masks_change_with_the_bucket():
    plan = plan_of("wan21")
    used = []
    full = torch.ones_like(plan.masks)
    full[1] = plan.masks[1]
    with patchkit.apply(
        pipeline("wan21"), "paro", plan=PermutePlan.from_masks(plan.order, full, plan.facts), layers=0
    ) as patch:

        def callback(pipe, step, timestep, kwargs):
            used.append(rows_of(patch)[0]["values"]["density"][0])
            return kwargs

        run("wan21", callback_on_step_end=callback)
        run("wan21", callback_on_step_end=callback)
    assert [d == 1.0 for d in used] == [True, True, False, False] * 2  # a second video begins anew


def test_warm_up_is_dense():
    for warm in (2, 0.5):
        with patchkit.apply(pipeline("wan21"), "paro", plan=plan_of("wan21"), warmup_steps=warm) as patch:
            run("wan21")
            for row in rows_of(patch):
                assert row["dense"] == {"warm-up": 2}
                assert row["counts"]["sparse"] == 2


def test_heads_that_keep_little_run_dense_where_asked():
    plan = plan_of("wan21")
    with patchkit.apply(pipeline("wan21"), "paro", plan=plan, dense_below=1.0) as patch:
        out = run("wan21")
        assert all(min(row["values"]["density"]) == 1.0 for row in rows_of(patch))
    assert torch.allclose(out, reference("wan21"), atol=2e-5, rtol=1e-4)
    with patchkit.apply(pipeline("wan21"), "paro", plan=plan, heads=0) as patch:
        run("wan21")
        for row in rows_of(patch):
            assert row["values"]["density"][0] < 1
            assert set(row["values"]["density"][1:]) == {1.0}


def test_empty_heads_see_text_only_and_need_text():
    plan = plan_of("cogvideox")
    empty = dataclasses.replace(plan, empty=torch.ones_like(plan.empty), path=None)
    with patchkit.apply(pipeline("cogvideox"), "paro", plan=empty, skip_empty=True) as patch:
        out = run("cogvideox")
        assert all(max(row["values"]["actual_density"][0]) < 0.9 for row in rows_of(patch))
    assert bool(out.isfinite().all())
    with pytest.raises(InvalidOption, match="nothing to attend to"):
        patchkit.apply(pipeline("wan21"), "paro", plan=plan_of("wan21"), skip_empty=True)


def test_padded_prompts_of_two_lengths_stay_sparse():
    prompts = {"prompt": ["a red circle", "a cat"]}
    wanted = run("hunyuan", **prompts)
    with patchkit.apply(pipeline("hunyuan"), "paro", plan=complete(plan_of("hunyuan"))) as patch:
        out = run("hunyuan", **prompts)
        assert all(row["counts"]["sparse"] == STEPS for row in rows_of(patch))
    assert torch.allclose(out, wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("qk", "pv"), [("int8", "none"), ("int8", "int8"), ("int4", "int4"), ("none", "fp8")])
def test_quantised_plans_stay_near(qk, pv):
    complete_plan = complete(plan_of("cogvideox"))
    with patchkit.apply(pipeline("cogvideox"), "paro", plan=complete_plan, qk=qk, pv=pv) as patch:
        out = run("cogvideox")
        assert "the rounding is simulated" in str(patch.report())
    error = float((out - reference("cogvideox")).norm() / reference("cogvideox").norm())
    assert 0 < error < (0.1 if "int4" in (qk, pv) else 0.03)


# --- refusals -----------------------------------------------------------------------------------------------


def test_a_plan_is_needed_and_has_to_be_one(tmp_path):
    with pytest.raises(InvalidOption, match="a plan is missing"):
        patchkit.apply(pipeline("wan21"), "paro")
    with pytest.raises(PlanError, match="there is no file"):
        patchkit.apply(pipeline("wan21"), "paro", plan=str(tmp_path / "none.safetensors"))
    with pytest.raises(InvalidOption, match="'plan'"):
        patchkit.apply(pipeline("wan21"), "paro", plan=3)


@pytest.mark.parametrize(
    ("facts", "call", "words"),
    [
        ({"grid": (2, 3, 4)}, {}, "it was made for a grid"),
        ({}, {"height": 64}, "it was made for a grid"),
        ({"text": (15, 15)}, {}, "it was made for 15 text tokens"),
        ({"steps": 7}, {}, "it was made for 7 steps, this run has 4"),
        ({"text_first": False}, {}, "the other end"),
        ({"block": 8}, {}, "masks have"),
        ({"text": (None, None), "text_first": True}, {"max_sequence_length": 20}, "masks have"),
    ],
)
def test_a_plan_for_something_else_is_refused_with_the_reason(facts, call, words):
    plan = changed(plan_of("cogvideox"), **facts)
    call = {"height": 128} if "height" in call else call
    with patchkit.apply(pipeline("cogvideox"), "paro", plan=plan), pytest.raises(PlanError, match=words):
        run("cogvideox", **call)
    assert torch.equal(run("cogvideox"), reference("cogvideox"))


def test_a_plan_for_another_model_or_scheduler_is_refused():
    with pytest.raises(NothingMatched, match="has no row for it"):
        patchkit.apply(pipeline("wan21"), "paro", plan=plan_of("cogvideox"))
    other = changed(plan_of("wan21"), models={"transformer": "AnotherModel"})
    with pytest.raises(PlanError, match="made for a AnotherModel"):
        patchkit.apply(pipeline("wan21"), "paro", plan=other)
    with pytest.raises(PlanError, match="made for 3 blocks, this"):
        patchkit.apply(pipeline("wan21"), "paro", plan=changed(plan_of("wan21"), layers={"transformer": 3}))
    plan, more = plan_of("wan21"), [0, 1, 1]
    wide = PermutePlan.from_masks(plan.order[:, more], plan.masks[:, :, more], plan.facts)
    with pytest.raises(NothingMatched, match="the plan has 3 heads"):
        patchkit.apply(pipeline("wan21"), "paro", plan=wide)
    with pytest.raises(PlanError, match="scheduler"):
        patchkit.apply(pipeline("wan21"), "paro", plan=changed(plan_of("wan21"), scheduler="Another"))
    assert not patchkit.status(pipeline("wan21"))["patched"]


def test_another_text_length_is_fine_where_text_stands_last_and_varied():
    """Mochi's sequences hold the valid text only: with guidance, both lengths are seen when the plan is made."""
    plan = plan_of("mochi")
    assert set(plan.facts.text) == {None}
    with patchkit.apply(pipeline("mochi"), "paro", plan=plan) as patch:
        run("mochi", prompt="a red circle and a green square")
        assert all(row["counts"]["sparse"] == row["calls"] for row in rows_of(patch))


# --- composition --------------------------------------------------------------------------------------------


def test_with_adaspa_on_other_steps_or_layers_only():
    from patchkit.recipes.adaspa import AdaSpa
    from patchkit.recipes.paro import Paro

    pipe, plan = pipeline("wan21"), plan_of("wan21")
    small = {"min_tokens": 0, "block_size": 16, "warmup_steps": 1, "search_steps": []}
    with pytest.raises(Conflict, match="both replace"):
        patchkit.apply(pipe, [Paro(plan=plan), AdaSpa(**small)])
    for a, b in (({"layers": 0}, {"layers": 1}), ({"steps": (0, 2)}, {"steps": (2, 4)})):
        with patchkit.apply(pipe, [Paro(plan=plan, **a), AdaSpa(**small, **b)]) as patch:
            assert bool(run("wan21").isfinite().all())
            counts = [r["counts"] for r in patch.report().to_dict()["recipes"]]
        assert all(c["sparse"] > 0 for c in counts)


def test_with_softpag():
    from patchkit.recipes.headhunter.softpag import SoftPAG
    from patchkit.recipes.paro import Paro

    pipe = pipeline("cogvideox")
    soft = SoftPAG(heads=[[1, 0]], strength=0.7, scale=1.5)
    with patchkit.apply(pipe, soft):
        wanted = run("cogvideox")
    with patchkit.apply(pipe, [soft, Paro(plan=complete(plan_of("cogvideox")))]):
        out = run("cogvideox")
    assert torch.allclose(out, wanted, atol=1e-4, rtol=1e-3)
    with patchkit.apply(pipe, [Paro(plan=plan_of("cogvideox")), soft]) as patch:
        sparse = run("cogvideox")
        assert patch.report().to_dict()["recipes"][0]["counts"]["sparse"] > 0
    assert bool(sparse.isfinite().all())
    assert not torch.allclose(sparse, wanted, atol=1e-3)


def test_dual_attention_has_a_row_with_text_and_one_without():
    """Stable Diffusion 3.5: blocks with a second attention over the image alone."""
    plan = plan_of("sd35")
    named = dict(zip(plan.facts.sites, plan.facts.text, strict=True))
    assert len(named) == 3
    assert {name.rpartition(".")[2] for name, text in named.items() if text == 0} == {"attn2"}
    assert {text for name, text in named.items() if name.endswith(".attn")} == {93}
    with patchkit.apply(pipeline("sd35"), "paro", plan=plan, qk="int8", skip_text_quant=True) as patch:
        assert bool(run("sd35").isfinite().all())
        assert all(row["counts"]["sparse"] == row["calls"] for row in rows_of(patch))


def test_text_can_be_left_unrounded():
    whole = complete(plan_of("cogvideox"))
    found = {}
    for spare in (False, True):
        options = {"plan": whole, "qk": "int4", "pv": "int4", "skip_text_quant": spare}
        with patchkit.apply(pipeline("cogvideox"), "paro", **options):
            found[spare] = float((run("cogvideox") - reference("cogvideox")).norm())
    assert 0 < found[True] < found[False]
    with pytest.raises(InvalidOption, match="text cannot be spared"):
        patchkit.apply(pipeline("cogvideox"), "paro", plan=whole, skip_text_quant=True)
    with pytest.raises(InvalidOption, match="there is no text"):
        patchkit.apply(pipeline("wan21"), "paro", plan=plan_of("wan21"), qk="int8", skip_text_quant=True)


def test_cross_attention_and_the_rest_are_not_touched():
    """Oracle 14."""
    pipe = pipeline("wan21")
    before = {n: m.processor for n, m in pipe.transformer.named_modules() if hasattr(m, "processor")}
    with patchkit.apply(pipe, "paro", plan=plan_of("wan21")) as patch:
        run("wan21")
        after = {n: m.processor for n, m in pipe.transformer.named_modules() if hasattr(m, "processor")}
        assert {row["site"] for row in rows_of(patch)} == {n for n in before if n.endswith("attn1")}
    assert all(after[n] is before[n] for n in before if n.endswith("attn2"))
    assert not any(hasattr(m, "processor") and "patchkit" in repr(m.processor) for m in pipe.vae.modules())


def test_wan22_has_rows_for_both_of_its_denoisers():
    plan = plan_of("wan22")
    assert {name.partition(".")[0] for name in plan.facts.sites} == {"transformer", "transformer_2"}
    assert set(plan.facts.models) == set(plan.facts.layers) == {"transformer", "transformer_2"}
    with patchkit.apply(pipeline("wan22"), "paro", plan=plan) as patch:
        run("wan22")
        calls = {}
        for row in rows_of(patch):
            calls.setdefault(row["component"], set()).add(row["counts"]["sparse"])
    assert {name: len(c) for name, c in calls.items()} == {"transformer": 1, "transformer_2": 1}
    assert sum(next(iter(c)) for c in calls.values()) == STEPS  # each step runs one of them


# --- calibration --------------------------------------------------------------------------------------------


def test_calibration_leaves_the_pipeline_as_it_was():
    make_plan("wan21", density=0.5)
    assert not patchkit.status(pipeline("wan21"))["patched"]
    assert torch.equal(run("wan21"), reference("wan21"))


def test_images_have_two_orders():
    assert set(plan_of("sd3").order.flatten().tolist()) <= {0, 1}
    assert set(plan_of("flux").order.flatten().tolist()) <= {0, 1}


@pytest.mark.parametrize("scope", ["head", "timestep", "global"])
def test_scopes(scope):
    plan = make_plan("wan21", scope=scope)
    mean = {"head": plan.density, "timestep": plan.density.mean((1, 2)), "global": plan.density.mean()}[scope]
    assert mean.flatten().tolist() == pytest.approx([0.4] * mean.numel(), abs=1 / plan.blocks)


def test_a_stopped_calibration_goes_on_with_what_is_missing(tmp_path):
    told = []
    options = {"prompts": ["a red circle", "a cat"], "folder": tmp_path}

    def stop(done, total, what):
        told.append((done, total, what))
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_plan("wan21", progress=stop, **options)
    assert not patchkit.status(pipeline("wan21"))["patched"]
    assert [t[:2] for t in told] == [(1, 4), (2, 4), (3, 4)]
    told.clear()
    resumed = make_plan("wan21", progress=lambda *a: told.append(a), **options)
    assert [("before" in what) for _, _, what in told] == [True, True, True, False]
    whole = make_plan("wan21", prompts=options["prompts"])
    assert torch.equal(resumed.masks, whole.masks)
    assert torch.equal(resumed.order, whole.order)
    assert resumed.facts == whole.facts
    with pytest.raises(InvalidOption, match="other settings"):
        make_plan("wan21", alpha=0.2, **options)
    with pytest.raises(InvalidOption, match="other settings"):
        make_plan("wan21", density=0.2, select="kept_mass", **options)
    with pytest.raises(InvalidOption, match="other call"):
        make_plan("wan21", guidance_scale=2.5, **options)


def test_a_calibration_stopped_in_the_middle_of_a_run_ends_in_the_same_plan(tmp_path, monkeypatch):
    from patchkit.recipes.paro.figures import MassFigures

    see, calls = MassFigures.see, []

    def stopping(self, *args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        see(self, *args)

    monkeypatch.setattr(MassFigures, "see", stopping)
    with pytest.raises(KeyboardInterrupt):
        make_plan("wan21", folder=tmp_path)
    resumed, whole = make_plan("wan21", folder=tmp_path), plan_of("wan21")
    for name in ("order", "bits", "kept_mass", "density", "empty"):
        assert torch.equal(getattr(resumed, name), getattr(whole, name)), name


def test_another_density_is_cut_from_the_same_figures(tmp_path, monkeypatch):
    make_plan("wan21", folder=tmp_path)
    monkeypatch.setattr(type(pipeline("wan21")), "__call__", lambda *a, **k: pytest.fail("no run is needed"))
    again = make_plan("wan21", density=0.6, scope="global", folder=tmp_path)
    monkeypatch.undo()
    fresh = make_plan("wan21", density=0.6, scope="global")
    assert torch.equal(again.masks, fresh.masks)
    assert float(again.density.mean()) == pytest.approx(0.6, abs=1 / again.blocks)


def test_a_patched_pipeline_and_bad_options_are_refused():
    with patchkit.apply(pipeline("wan21"), "paro", plan=plan_of("wan21")), pytest.raises(Conflict, match="is patched"):
        make_plan("wan21")
    for options in ({"density": 0.0}, {"alpha": 2.0}, {"select": "x"}, {"scope": "x"}, {"eps": "abs"}, {"buckets": 0}):
        with pytest.raises(InvalidOption):
            make_plan("wan21", **options)
    with pytest.raises(PatchkitError, match="no plan can be made"):
        make_plan("wan21", block_size=4096)


def test_relative_eps_and_selection_by_mass_change_the_orders_only():
    a, b = make_plan("wan21", select="kept_mass"), make_plan("wan21", eps="rel", alpha=1.0)
    assert a.facts.options["select"] == "kept_mass"
    assert b.facts.options["eps"] == "rel"
    assert float(a.kept_mass.mean()) >= float(make_plan("wan21", alpha=0.0).kept_mass.mean()) - 0.02


def test_saved_and_named_by_its_file(tmp_path):
    plan = plan_of("wan21")
    path = plan.save(tmp_path / "plan.safetensors")
    with patchkit.apply(pipeline("wan21"), "paro", plan=str(path)) as patch:
        from_file = run("wan21")
        patch.save(tmp_path / "recipe.yaml")
    with patchkit.apply(pipeline("wan21"), "paro", plan=plan):
        assert torch.equal(run("wan21"), from_file)
    with patchkit.apply(pipeline("wan21"), tmp_path / "recipe.yaml"):
        assert torch.equal(run("wan21"), from_file)
    json.dumps(patchkit.registry.get("paro").schema())


def test_predicted_cost_follows_the_plan():
    plan = plan_of("wan21")
    recipe = patchkit.registry.get("paro")(plan=plan, warmup_steps=2)
    wanted = (2 + 2 * float(plan.density[1].mean())) / 4
    assert recipe.attention_cost(1000, 4) == pytest.approx(wanted)


def test_masks_without_reordering():
    plan = make_plan("wan21", codes=[0])
    assert not plan.order.any()
    assert float(plan.density.mean()) == pytest.approx(0.4, abs=1 / plan.blocks)
    with pytest.raises(InvalidOption, match="codes"):
        make_plan("wan21", codes=[7])
