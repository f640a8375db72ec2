"""Hooks that move or cast weights at every call: patched under them, or put under them, and taken off exactly.

All of it runs with the CPU as the device that weights are brought to, so only the moving itself is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from fingerprint import assert_same, diff, fingerprint
from mechanism.toys import Scale, Watch

import patchkit

CPU = torch.device("cpu")
SMALL = {"min_tokens": 0, "block_size": 4, "warmup_steps": 1, "search_steps": []}


def denoiser(pipe: Any) -> Any:
    return getattr(pipe, "transformer", None) or pipe.unet


def group_by_block(pipe: Any) -> None:
    pipe.enable_group_offload(CPU, CPU, offload_type="block_level", num_blocks_per_group=1)


def group_by_leaf(pipe: Any) -> None:
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(denoiser(pipe), CPU, CPU, offload_type="leaf_level")


def sequential(pipe: Any) -> None:
    """What ``enable_sequential_cpu_offload`` does; that itself asks for "cpu:0", which accelerate cannot move to."""
    from accelerate import cpu_offload

    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            cpu_offload(part, CPU, offload_buffers=len(part._parameters) > 0)


def cast_to_bf16(pipe: Any) -> None:
    denoiser(pipe).enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


def cast_to_fp8(pipe: Any) -> None:
    denoiser(pipe).enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


WAYS = [group_by_block, group_by_leaf, sequential, cast_to_bf16, cast_to_fp8]
ATTACH = pytest.mark.parametrize("attach", WAYS, ids=lambda way: way.__name__)
NAMES = pytest.mark.parametrize("name", ["wan21", "sd15", "cogvideox"])


@NAMES
@ATTACH
def test_patched_under_the_hooks(name: str, attach: Callable[[Any], None]) -> None:
    entry: Any = tiny.PIPELINES[name]
    pipe, watch = entry.build(), Watch()
    attach(pipe)
    plain = tiny.run(entry, pipe)
    before = fingerprint(pipe, by_value=True)
    with patchkit.apply(pipe, watch) as patch:
        assert torch.equal(tiny.run(entry, pipe), plain)
        assert diff(before, fingerprint(pipe, by_value=True)), "the check would not notice a patch"
        assert {s.step for s in watch.seen} == {0, 1}
        assert patch.report()["drift"] == []
        assert patch.remove() == []
    with patchkit.apply(pipe, Scale()):
        assert not torch.equal(tiny.run(entry, pipe), plain)
    assert torch.equal(tiny.run(entry, pipe), plain)
    assert_same(before, fingerprint(pipe, by_value=True))


@NAMES
@ATTACH
def test_hooks_on_what_is_patched_already(name: str, attach: Callable[[Any], None]) -> None:
    entry: Any = tiny.PIPELINES[name]
    other = entry.build()
    attach(other)
    plain = tiny.run(entry, other)
    pipe, watch = entry.build(), Watch()
    types = {n: type(m) for n, m in denoiser(pipe).named_modules()}
    patch = patchkit.apply(pipe, watch)
    attach(pipe)
    assert torch.equal(tiny.run(entry, pipe), plain)
    assert {s.step for s in watch.seen} == {0, 1}
    assert patch.report()["drift"] == []
    assert patch.remove() == []
    assert torch.equal(tiny.run(entry, pipe), plain)
    assert {n: type(m) for n, m in denoiser(pipe).named_modules()} == types
    assert all(not hasattr(m.processor, "_patchkit_site") for m in denoiser(pipe).modules() if hasattr(m, "processor"))


@pytest.mark.parametrize("name", ["wan21", "cogvideox"])
@ATTACH
def test_adaspa_under_the_hooks(name: str, attach: Callable[[Any], None]) -> None:
    entry: Any = tiny.PIPELINES[name]
    pipe = entry.build()
    attach(pipe)
    plain = tiny.run(entry, pipe, steps=3)
    before = fingerprint(pipe, by_value=True)
    with patchkit.apply(pipe, "adaspa", density=0.25, **SMALL) as patch:
        sparse = tiny.run(entry, pipe, steps=3)
        counts = patch.report()["recipes"][0]["counts"]
    assert counts["sparse"] == 2 * counts["fused_search"]
    assert not torch.equal(sparse, plain)
    assert torch.equal(tiny.run(entry, pipe, steps=3), plain)
    assert_same(before, fingerprint(pipe, by_value=True))
