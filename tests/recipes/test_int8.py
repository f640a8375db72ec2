"""Quantised dense attention as a drop-in on pipelines of the real classes."""

from __future__ import annotations

import functools

import pytest
import tiny
import torch

import patchkit
from patchkit.context import AttentionCall
from patchkit.errors import Conflict, InvalidOption, PatchkitError
from patchkit.recipes.int8 import Int8, packed_keys
from patchkit.sites import Site

NAMES = ("cogvideox", "hunyuan", "wan21", "mochi", "ltx", "flux", "sd3", "qwenimage", "sd15", "pixart", "sana", "sdxl")


@functools.cache
def pipeline(name):
    return tiny.PIPELINES[name].build()


def run(name, **extra):
    return tiny.run(tiny.PIPELINES[name], pipeline(name), **extra)


@functools.cache
def reference(name):
    return run(name)


def error(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def report_of(patch):
    return patch.report().to_dict()["recipes"][0]


@pytest.mark.parametrize("name", NAMES)
def test_stays_near_on_every_pipeline_and_leaves_no_trace(name):
    wanted = reference(name)
    with patchkit.apply(pipeline(name), "int8", pv="int8") as patch:
        out = run(name)
        report = report_of(patch)
    assert 0 < error(out, wanted) < 0.05
    assert report["counts"]["quantised"] > 0
    assert set(report["dense"]) <= {"mask is not key padding"}
    assert torch.equal(run(name), wanted)


@pytest.mark.parametrize(
    ("options", "limit"),
    [({}, 0.01), ({"p_scale": "row", "pv": "int8"}, 0.01), ({"qk": "none", "pv": "fp8"}, 0.02), ({"qk": "int4"}, 0.1)],
)
def test_options_reach_the_operator(options, limit):
    with patchkit.apply(pipeline("cogvideox"), "int8", **options):
        found = error(run("cogvideox"), reference("cogvideox"))
    assert 0 < found < limit


def test_smoothing_can_be_turned_off():
    with patchkit.apply(pipeline("wan21"), "int8", pv="int8"):
        smooth = run("wan21")
    with patchkit.apply(pipeline("wan21"), "int8", pv="int8", smooth_k=False, smooth_v=False):
        assert not torch.equal(run("wan21"), smooth)


@pytest.mark.parametrize("name", ["hunyuan", "qwenimage"])
def test_padding_wherever_it_stands(name):
    """Text of two lengths in a batch: padding at the end, or between text and image."""
    prompts = {"prompt": ["a red circle", "a cat"]}
    if name == "qwenimage":
        prompts["negative_prompt"] = ["", "blurred and grey"]
    wanted = run(name, **prompts)
    with patchkit.apply(pipeline(name), "int8") as patch:
        out = run(name, **prompts)
        assert not report_of(patch)["dense"]
    assert 0 < error(out, wanted) < 0.02


def call_with(mask, n=6):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 1, n, 4, generator=g) for _ in range(3))
    return AttentionCall(q, k, v, mask, None, False, Site("t", "a", torch.nn.Identity(), "self", 0, 1))


def test_keys_are_packed_in_front():
    valid = torch.tensor([[True, False, True, True, False, True], [True] * 6])
    call = call_with(valid[:, None, None])
    k, v, lens = packed_keys(call)
    assert lens.tolist() == [4, 6]
    assert torch.equal(k[0, :, :4], call.k[0, :, [0, 2, 3, 5]])
    assert torch.equal(v[1], call.v[1])
    assert packed_keys(call_with(None))[2] is None
    assert packed_keys(call_with(torch.ones(2, 6, dtype=torch.bool)))[2] is None
    tail = call_with(torch.tensor([[True] * 4 + [False] * 2]))
    k, _, lens = packed_keys(tail)
    assert k is tail.k
    assert lens.tolist() == [4, 4]
    assert packed_keys(call_with(torch.ones(2, 1, 6, 6, dtype=torch.bool).tril())) == "mask is not key padding"


def test_refusals():
    with pytest.raises(InvalidOption, match="nothing is quantised"):
        Int8(qk="none")
    with pytest.raises(InvalidOption, match="'qk'"):
        Int8(qk="int3")
    with pytest.raises(PatchkitError, match="not for transformers"):
        patchkit.apply(tiny.MODELS["llama"].build(), Int8())
    with pytest.raises(Conflict, match="both replace"):
        patchkit.apply(pipeline("wan21"), [Int8(), patchkit.registry.get("adaspa")()])


def test_the_report_says_that_it_is_simulated():
    with patchkit.apply(pipeline("sd3"), "int8") as patch:
        run("sd3")
        text = str(patch.report())
    assert "slower than dense expected" in text
    assert "the rounding is simulated" in text
