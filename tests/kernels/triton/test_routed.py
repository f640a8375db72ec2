"""The routed-heads kernel, interpreted, against all heads dense, times their gates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from patchkit.kernels import KernelValueError, routed_attention, routed_path
from patchkit.kernels.routed.reference import routed_reference
from patchkit.kernels.routed.triton import launch
from patchkit.kernels.routed.triton.table import Tile

pytestmark = pytest.mark.usefixtures("nan_buffers", "on_triton")


def routing(B: int, H: int, N: int, share: float = 0.5) -> tuple[Tensor, Tensor]:
    """Active rows, none of them of the last head, and gates."""
    g = torch.Generator().manual_seed(3)
    active = torch.rand(B, H, N, generator=g) < share
    active[:, -1] = False
    return active, torch.rand(B, H, N, generator=g) + 0.5


def masks(kind: str | None, B: int, N: int, M: int) -> Tensor | None:
    g = torch.Generator().manual_seed(5)
    key = torch.ones(B, 1, 1, M, dtype=torch.bool)
    if kind == "left":
        key[0, ..., : M // 3] = False
    elif kind == "right":
        key[0, ..., -(M // 3) :] = False
    elif kind == "holes":
        key = torch.rand(B, 1, 1, M, generator=g) < 0.7
    elif kind == "pairs":
        return torch.rand(B, 1, N, M, generator=g) < 0.3
    elif kind == "shared pairs":
        return torch.rand(N, M, generator=g) < 0.3
    return None if kind is None else key


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("kind", [None, "left", "right", "holes", "pairs", "shared pairs"])
@pytest.mark.parametrize(
    ("H", "G", "N", "M"),
    [(2, 2, 63, 63), (4, 1, 70, 200), (8, 1, 1, 130), (2, 1, 40, 25)],
    ids=["MHA", "GQA 4 prefill in parts", "decode", "fewer keys"],
)
def test_agrees_with_the_formula(qkv, close, causal, kind, H, G, N, M):
    B = 2 if N < 70 else 1
    q, k, v = qkv(B, H, G, N, M, 64)
    active, gates = routing(B, H, N)
    options: dict[str, Any] = {"gates": gates, "causal": causal, "mask": masks(kind, B, N, M)}
    got = routed_attention(q, k, v, active, path="triton", **options)
    close(got, routed_reference(q, k, v, active, **options))
    assert not bool(got[~active].any())


@pytest.mark.parametrize("D", [16, 72, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_head_sizes_and_dtypes(qkv, close, D, dtype):
    q, k, v = qkv(1, 4, 2, 100, 100, D, dtype)
    active, gates = routing(1, 4, 100)
    got = routed_attention(q, k, v, active, gates=gates.to(dtype), causal=True, path="triton")
    assert got.dtype == dtype
    close(got, routed_reference(q, k, v, active, gates=gates.to(dtype), causal=True))


def test_the_largest_head(qkv, close):
    q, k, v = qkv(1, 2, 1, 70, 70, 256, torch.float16)
    active, _ = routing(1, 2, 70, 0.7)
    close(routed_attention(q, k, v, active, causal=True, path="triton"), routed_reference(q, k, v, active, causal=True))


@pytest.mark.parametrize("shared", [1, 2, 3, 4])
@pytest.mark.parametrize(("M", "kind"), [(60, None), (90, None), (60, "left")])
def test_shared_heads(qkv, close, shared, M, kind):
    """By torch's own kernel where nothing but a square diagonal is hidden, else with the others."""
    q, k, v = qkv(1, 4, 2, 60, M, 32)
    active, gates = routing(1, 4, 60)
    options: dict[str, Any] = {"gates": gates, "causal": True, "shared": shared, "mask": masks(kind, 1, 60, M)}
    close(routed_attention(q, k, v, active, path="triton", **options), routed_reference(q, k, v, active, **options))


def test_several_tiles_of_a_group_end_at_their_own_diagonals(qkv, close, monkeypatch):
    monkeypatch.setattr(launch, "tile_for", lambda *args: Tile(16, 16, 4, 2))
    q, k, v = qkv(1, 4, 1, 40, 56, 32)
    for share in (0.2, 0.9):
        active, gates = routing(1, 4, 40, share)
        got = routed_attention(q, k, v, active, gates=gates, causal=True, path="triton")
        close(got, routed_reference(q, k, v, active, gates=gates, causal=True))


@pytest.mark.parametrize("kind", ["left", "right", "holes"])
def test_hidden_keys_may_hold_anything(qkv, close, kind):
    q, k, v = qkv(2, 2, 1, 60, 60, 32)
    active, _ = routing(2, 2, 60)
    mask = masks(kind, 2, 60, 60)
    want = routed_reference(q, k, v, active, causal=True, mask=mask)
    hidden = ~mask.view(2, 1, 60, 1)
    k, v = k.masked_fill(hidden, float("nan")), v.masked_fill(hidden, float("nan"))
    q = q.masked_fill(~active.unsqueeze(-1), float("nan"))
    close(routed_attention(q, k, v, active, causal=True, mask=mask, path="triton"), want)


def test_hidden_by_pairs_may_hold_anything(qkv, close):
    q, k, v = qkv(1, 2, 1, 40, 60, 32)
    active, _ = routing(1, 2, 40)
    mask = masks("pairs", 1, 40, 60)
    mask[..., 7:20] = False
    want = routed_reference(q, k, v, active, mask=mask)
    k[:, :, 7:20] = v[:, :, 7:20] = float("nan")
    close(routed_attention(q, k, v, active, mask=mask, path="triton"), want)


def test_strided_views_scales_and_empty_lists(qkv, close):
    q, k, v = qkv(2, 4, 2, 50, 50, 32)
    active, gates = routing(2, 4, 50)
    active[1] = False
    for scale in (-0.3, 0.0, 2.0):
        want = routed_reference(q, k, v, active, gates=gates, scale=scale)
        views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
        strided = gates.transpose(1, 2).contiguous().transpose(1, 2)
        close(routed_attention(*views, active, gates=strided, scale=scale, path="triton"), want)


def test_nothing_to_see(qkv):
    q, k, v = qkv(1, 2, 1, 20, 30, 16)
    on = torch.ones(1, 2, 20, dtype=torch.bool)
    for mask in (torch.zeros(1, 1, 1, 30, dtype=torch.bool), torch.zeros(1, 1, 20, 30, dtype=torch.bool)):
        assert not bool(routed_attention(q, k, v, on, mask=mask, path="triton").any())


def test_lists_are_sorted_by_token(qkv):
    active, _ = routing(2, 6, 30)
    rows, counts = launch.row_lists(active, 2)
    for b in range(2):
        for j in range(2):
            listed = rows[b * 2 + j, : counts[b * 2 + j]].tolist()
            wanted = [t * 3 + h for t in range(30) for h in range(3) if active[b, j * 3 + h, t]]
            assert listed == wanted


def test_same_bits_twice_and_gradients(qkv, close):
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 1, 40, 40, 32))
    active, _ = routing(1, 2, 40)
    first = routed_attention(q, k, v, active, causal=True, path="triton")
    assert torch.equal(routed_attention(q, k, v, active, causal=True, path="triton"), first)
    got = torch.autograd.grad(first.square().sum(), (q, k, v))
    want = torch.autograd.grad(routed_reference(q, k, v, active, causal=True).square().sum(), (q, k, v))
    for a, b in zip(got, want, strict=True):
        close(a.detach(), b.detach(), tol=1e-5)


def test_the_path_and_what_it_does_not_take(qkv):
    q, k, v = qkv(1, 2, 1, 4096, 4096, 1)
    active, _ = routing(1, 2, 4096)
    assert routed_path(q, k, active).name == "triton"
    assert "too short" in routed_path(q[:, :, :1000], k[:, :, :1000], active[:, :, :1000]).reason
    q, k, v = qkv(1, 2, 1, 20, 20, 264, torch.float16)
    with pytest.raises(KernelValueError, match="head size 264"):
        routed_attention(q, k, v, active[:, :, :20], path="triton")
    with pytest.raises(KernelValueError, match=r"no kernel for torch\.float64"):
        routed_attention(q.double(), k.double(), v.double(), active[:, :, :20], path="triton")
