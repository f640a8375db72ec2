"""What others attach, named in plan, status and report, never overwritten, refused where it must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import tiny
import torch
from fingerprint import assert_same, fingerprint
from mechanism.toys import Identity, Scale, Watch, counting_ops

import patchkit
from patchkit.sites import Site


def hooked(kind: str) -> Callable[[Any], None]:
    from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig

    def attach(pipe: Any) -> None:
        if kind == "first block cache":
            pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
        elif kind == "attention broadcast":
            config = PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2,
                spatial_attention_timestep_skip_range=(100, 900),
                current_timestep_callback=lambda: pipe._current_timestep,
            )
            pipe.transformer.enable_cache(config)

    return attach


def pag(pipe: Any) -> None:
    from diffusers.models.attention_processor import PAGCFGIdentitySelfAttnProcessor2_0

    pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor = PAGCFGIdentitySelfAttnProcessor2_0()


def ip_adapter(pipe: Any) -> None:
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    part = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    part.processor = IPAdapterAttnProcessor2_0(part.to_k.out_features, part.to_k.in_features)


def fused(pipe: Any) -> None:
    pipe.unet.fuse_qkv_projections()


FOREIGN: dict[str, tuple[str, Callable[[Any], None], str]] = {
    "first block cache": ("wan21", hooked("first block cache"), "fbc"),
    "attention broadcast": ("wan21", hooked("attention broadcast"), "pyramid_attention_broadcast"),
    "pag": ("sd15", pag, "perturbed-attention guidance"),
    "ip-adapter": ("sd15", ip_adapter, "IP-Adapter"),
    "fused": ("sd15", fused, "fused QKV"),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_attached_by_others(kind: str, when: str) -> None:
    name, attach, word = FOREIGN[kind]
    pipe = tiny.PIPELINES[name].build()
    if when == "before":
        attach(pipe)
        plan = patchkit.plan(pipe, Identity())
        assert word in str(plan)
        assert any(word in line for line in plan.to_dict()["foreign"])
    with patchkit.apply(pipe, Identity()) as patch:
        if when == "after":
            attach(pipe)
        assert any(word in line for line in patchkit.status(pipe)["foreign"])
        assert word in str(patch.report())
        drift = patchkit.status(pipe)["drift"]
        replaces = when == "after" and kind in ("pag", "ip-adapter", "fused")
        assert bool(drift) == replaces
        assert patch.report()["drift"] == drift
        if replaces:
            assert drift[0] in str(patch.report())
        assert bool(patch.remove()) == replaces


@pytest.mark.parametrize("kind", ["first block cache", "attention broadcast"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_with_a_cache(kind: str, when: str) -> None:
    """The same result with an identity patch, and an exact undo under the cache."""
    name, attach, _ = FOREIGN[kind]
    entry = tiny.PIPELINES[name]
    other = entry.build()
    attach(other)
    plain = tiny.run(entry, other, steps=3)
    pipe, watch = entry.build(), Watch()
    if when == "before":
        attach(pipe)
    with patchkit.apply(pipe, watch):
        if when == "after":
            attach(pipe)
        assert torch.equal(tiny.run(entry, pipe, steps=3), plain)
        assert watch.seen
    assert torch.equal(tiny.run(entry, pipe, steps=3), plain)


def test_context_parallelism_is_refused() -> None:
    pipe = tiny.PIPELINES["wan21"].build()
    for part in pipe.transformer.modules():
        if hasattr(part, "processor"):
            part.processor._parallel_config = object()
    plan = patchkit.plan(pipe, Identity())
    assert "context parallelism" in str(plan)
    before = fingerprint(pipe)
    with pytest.raises(patchkit.Conflict, match="context parallelism"):
        patchkit.apply(pipe, Identity())
    assert_same(before, fingerprint(pipe))


def test_context_parallelism_switched_on_after_patching() -> None:
    entry = tiny.PIPELINES["wan21"]
    pipe = entry.build()
    with patchkit.apply(pipe, Identity()):
        for part in pipe.transformer.modules():
            if hasattr(part, "processor"):
                part.processor._parallel_config = object()
        with pytest.raises(patchkit.UnsupportedModel, match="context parallelism"):
            tiny.run(entry, pipe)


@pytest.mark.parametrize("name", ["sd15", "sd3", "cogvideox", "flux", "wan21"])
def test_fusing_while_patched_and_unfusing_after(name: str) -> None:
    """Unfusing puts processors back that were ours: after removal they run upstream's function, and can be patched."""
    entry = tiny.PIPELINES[name]
    pipe = entry.build()
    plain = tiny.run(entry, pipe)
    model = getattr(pipe, entry.denoisers[0])
    patch = patchkit.apply(pipe, Scale())
    scaled = tiny.run(entry, pipe)
    model.fuse_qkv_projections()
    replaced = any("Fused" in type(m.processor).__name__ for m in model.modules() if hasattr(m, "processor"))
    assert bool(patchkit.status(pipe)["drift"]) == replaced
    assert bool(patch.remove()) == replaced
    torch.testing.assert_close(tiny.run(entry, pipe), plain, atol=1e-4, rtol=1e-4)
    model.unfuse_qkv_projections()
    with mock.patch.object(Site, "run", side_effect=AssertionError("a removed patch still runs")):
        assert torch.equal(tiny.run(entry, pipe), plain)
    with patchkit.apply(pipe, Scale()) as again:
        assert torch.equal(tiny.run(entry, pipe), scaled)
        assert again.report()["drift"] == []
    assert torch.equal(tiny.run(entry, pipe), plain)


def test_a_config_of_ours_that_somebody_kept() -> None:
    entry = tiny.MODELS["llama"]
    model = entry.build()
    plain = tiny.forward(entry, model)
    part = model.model.layers[0].self_attn
    with patchkit.apply(model, Scale()):
        scaled = tiny.forward(entry, model)
        kept = part.config
    part.config = kept
    assert torch.equal(tiny.forward(entry, model), plain)
    with patchkit.apply(model, Scale()):
        assert torch.equal(tiny.forward(entry, model), scaled)
    assert torch.equal(tiny.forward(entry, model), plain)


@pytest.mark.parametrize("name", ["sd15", "wan21"])
def test_processors_set_after_patching(name: str) -> None:
    entry = tiny.PIPELINES[name]
    pipe = entry.build()
    plain = tiny.run(entry, pipe)
    model = getattr(pipe, entry.denoisers[0])
    theirs = type(next(iter(model.attn_processors.values())))()
    patch = patchkit.apply(pipe, Scale())
    sites = len(patchkit.status(pipe)["recipes"][0]["sites"])
    model.set_attn_processor(theirs)
    drift = patchkit.status(pipe)["drift"]
    assert len(drift) == sites == len(patch.report()["drift"])
    assert all(f"is now {type(theirs).__name__}" in line for line in drift)
    assert torch.equal(tiny.run(entry, pipe), plain), "the patch is off, as it says"
    assert len(patch.remove()) == sites
    assert all(p is theirs for p in model.attn_processors.values())


def test_processors_read_and_set_again_are_no_drift() -> None:
    entry = tiny.PIPELINES["sd15"]
    pipe = entry.build()
    plain = tiny.run(entry, pipe)
    with patchkit.apply(pipe, Scale()) as patch:
        scaled = tiny.run(entry, pipe)
        pipe.unet.set_attn_processor(dict(pipe.unet.attn_processors))
        assert torch.equal(tiny.run(entry, pipe), scaled)
        assert patch.remove() == []
    assert torch.equal(tiny.run(entry, pipe), plain)


def test_a_backend_set_before_and_after_patching() -> None:
    entry = tiny.PIPELINES["wan21"]
    pipe = entry.build()
    plain = tiny.run(entry, pipe)
    for part in pipe.transformer.modules():
        if hasattr(part, "processor"):
            part.processor._attention_backend = "native"
    before = fingerprint(pipe)
    with patchkit.apply(pipe, Scale()) as patch:
        scaled = tiny.run(entry, pipe)
        assert not torch.equal(scaled, plain)
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry

        default = _AttentionBackendRegistry._active_backend
        pipe.transformer.set_attention_backend("_native_math")
        _AttentionBackendRegistry._active_backend = default
        torch.testing.assert_close(tiny.run(entry, pipe), scaled, atol=1e-4, rtol=1e-4)
        assert patch.report()["drift"] == []
    assert_same(before, fingerprint(pipe))


def test_a_swapped_transformer_is_named() -> None:
    entry = tiny.PIPELINES["wan21"]
    pipe, watch = entry.build(), Watch()
    old = pipe.transformer
    patch = patchkit.apply(pipe, watch)
    pipe.transformer = entry.build().transformer
    tiny.run(entry, pipe)
    assert watch.seen == []
    (line,) = patchkit.status(pipe)["drift"]
    assert "transformer is now another WanTransformer3DModel: it runs unpatched" in line
    assert patch.remove() == [line]
    assert not any(hasattr(type(m), "__patchkit__") for m in old.modules())
    pipe.transformer = None
    patchkit.status(entry.build())


def test_a_subclass_put_on_top_of_ours_stays() -> None:
    """Removal must not tear out somebody else's class; what is left of ours only passes calls on."""
    entry = tiny.PIPELINES["wan21"]
    pipe = entry.build()
    plain = tiny.run(entry, pipe)
    patch = patchkit.apply(pipe, Scale())
    theirs = type("Theirs", (type(pipe),), {})
    pipe.__class__ = theirs
    (line,) = patch.remove()
    assert "is now Theirs" in line
    assert type(pipe) is theirs
    assert torch.equal(tiny.run(entry, pipe), plain)
    assert not patchkit.status(pipe)["patched"]
    watch = Watch()
    with patchkit.apply(pipe, watch):
        tiny.run(entry, pipe)
    assert len(watch.seen) == 16
    assert type(pipe) is theirs


def test_nothing_of_ours_runs_after_removal() -> None:
    entry = tiny.PIPELINES["wan21"]
    pipe = entry.build()
    with counting_ops() as before:
        tiny.run(entry, pipe)
    patchkit.apply(pipe, Scale()).remove()
    with counting_ops() as after:
        tiny.run(entry, pipe)
    assert before == after
