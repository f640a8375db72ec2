"""Attention of routed heads against all heads dense, times their gates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from patchkit.kernels import GradientError, KernelTypeError, KernelValueError, routed_attention, routed_path
from patchkit.kernels.routed import blocked
from patchkit.kernels.routed.reference import routed_reference
from patchkit.kernels.routed.sight import sights_of

PATHS = pytest.mark.parametrize("path", ["dense", "blocked"])


def routing(B: int, H: int, N: int, share: float = 0.5, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Active rows, none of them of the last head, and gates."""
    g = torch.Generator().manual_seed(seed)
    active = torch.rand(B, H, N, generator=g) < share
    active[:, -1] = False
    return active, torch.rand(B, H, N, generator=g) + 0.5


def padding(B: int, N: int, M: int, kind: str | None) -> Tensor | None:
    g = torch.Generator().manual_seed(5)
    key = torch.ones(B, 1, 1, M, dtype=torch.bool)
    if kind == "left":
        key[0, ..., : M // 3] = False
    elif kind == "right":
        key[0, ..., -(M // 3) :] = False
    elif kind == "both":
        key[..., : M // 5] = False
        key[0, ..., -(M // 4) :] = False
    elif kind == "holes":
        key = torch.rand(B, 1, 1, M, generator=g) < 0.7
    elif kind == "library":  # a library's own: causality and padding in one
        key[0, ..., : M // 3] = False
        return key & torch.ones(N, M, dtype=torch.bool).tril(M - N)
    elif kind == "window":
        return (torch.arange(N)[:, None] + M - N - torch.arange(M)).abs() < 20
    elif kind == "any":
        return torch.rand(B, 1, N, M, generator=g) < 0.2
    return None if kind is None else key


@PATHS
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("pad", [None, "left", "right", "both", "holes", "library", "window", "any"])
@pytest.mark.parametrize(
    ("H", "G", "N", "M", "D"),
    [(4, 4, 63, 63, 64), (8, 2, 200, 200, 80), (8, 1, 70, 333, 16), (4, 2, 50, 30, 16), (8, 8, 1, 130, 64)],
    ids=["MHA", "GQA 4", "GQA 8 prefill in parts", "fewer keys", "decode"],
)
def test_agrees_with_the_formula(qkv, close, path, causal, pad, H, G, N, M, D):
    q, k, v = qkv(2, H, G, N, M, D)
    active, gates = routing(2, H, N)
    for shared in (0, 1, H // 2):
        options: dict[str, Any] = {"shared": shared, "gates": gates, "causal": causal, "mask": padding(2, N, M, pad)}
        got = routed_attention(q, k, v, active, path=path, **options)
        close(got, routed_reference(q, k, v, active, **options))
        assert not bool(got[:, -1].any())
        assert not bool(got[:, shared:][~active[:, shared:]].any())


@PATHS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(qkv, close, path, dtype):
    q, k, v = qkv(1, 4, 2, 150, 150, 64, dtype)
    active, gates = routing(1, 4, 150)
    for causal in (False, True):
        options: dict[str, Any] = {"shared": 1, "gates": gates, "causal": causal}
        got = routed_attention(q, k, v, active, path=path, **options)
        assert got.dtype == dtype
        close(got, routed_reference(q, k, v, active, **options))


def test_hardware_low_precision_takes_the_kernels_of_torch(qkv, close, monkeypatch):
    monkeypatch.setattr(blocked, "native_low_precision", lambda: True)
    q, k, v = qkv(1, 4, 2, 300, 300, 64, torch.bfloat16)
    active, _ = routing(1, 4, 300)
    got = routed_attention(q, k, v, active, causal=True, path="blocked")
    close(got, routed_reference(q, k, v, active, causal=True))


@PATHS
@pytest.mark.parametrize("pad", ["left", "right", "holes"])
@pytest.mark.parametrize("causal", [False, True])
def test_hidden_keys_may_hold_anything(qkv, close, path, pad, causal):
    q, k, v = qkv(2, 4, 2, 90, 90, 32)
    active, _ = routing(2, 4, 90)
    mask = padding(2, 90, 90, pad)
    want = routed_reference(q, k, v, active, causal=causal, mask=mask, shared=1)
    hidden = ~mask.view(2, 1, 90, 1)
    k, v = k.masked_fill(hidden, float("nan")), v.masked_fill(hidden, float("nan"))
    close(routed_attention(q, k, v, active, causal=causal, mask=mask, shared=1, path=path), want)
    close(routed_reference(q, k, v, active, causal=causal, mask=mask, shared=1), want)


@PATHS
def test_gates_and_queries_that_are_not_active_are_not_used(qkv, close, path):
    q, k, v = qkv(1, 4, 4, 80, 80, 32)
    active, gates = routing(1, 4, 80)
    want = routed_reference(q, k, v, active, gates=gates)
    q, gates = q.masked_fill(~active.unsqueeze(-1), float("nan")), gates.masked_fill(~active, float("nan"))
    close(routed_attention(q, k, v, active, gates=gates, path=path), want)


@PATHS
@pytest.mark.parametrize("G", [1, 2, 4])
def test_strided_views(qkv, close, path, G):
    """(B, N, H, D) in memory, as models have it, and a cache that is longer than its keys."""
    q, k, v = qkv(2, 4, G, 70, 100, 32)
    active, gates = routing(2, 4, 70)
    want = routed_reference(q, k, v, active, gates=gates, causal=True, shared=1)
    cache_k, cache_v = (torch.full((2, 128, G, 32), float("nan")) for _ in range(2))
    cache_k[:, :100], cache_v[:, :100] = k.transpose(1, 2), v.transpose(1, 2)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    k, v = (x[:, :100].transpose(1, 2) for x in (cache_k, cache_v))
    active = active.transpose(1, 2).contiguous().transpose(1, 2)
    gates = gates.transpose(1, 2).contiguous().transpose(1, 2)
    got = routed_attention(q, k, v, active, gates=gates, causal=True, shared=1, path=path)
    close(got, want)
    assert got.is_contiguous()


def test_parts_of_a_prompt_give_what_the_whole_gives(qkv, close):
    q, k, v = qkv(1, 4, 2, 300, 300, 32)
    active, gates = routing(1, 4, 300)
    whole = routed_attention(q, k, v, active, gates=gates, causal=True, shared=1, path="blocked")
    for low, high in ((0, 130), (130, 299), (299, 300)):
        rows = slice(low, high)
        part = routed_attention(
            q[:, :, rows],
            k[:, :, :high],
            v[:, :, :high],
            active[:, :, rows],
            gates=gates[:, :, rows],
            causal=True,
            shared=1,
            path="blocked",
        )
        close(part, whole[:, :, rows])


@pytest.mark.parametrize("causal", [False, True])
def test_large_logits_are_computed_again_with_care(qkv, close, causal):
    """Sums of powers of two overflow here in some rows, and vanish in others."""
    q, k, v = qkv(1, 2, 1, 300, 300, 32)
    q[:, 0, 100:140] *= 100
    k[..., 0] += 3
    q[:, 1, :, 0] -= 300
    active, _ = routing(1, 2, 300, 0.8)
    active[:, 1] = active[:, 0].flip(-1)
    got = routed_attention(q, k, v, active, causal=causal, path="blocked")
    close(got, routed_reference(q, k, v, active, causal=causal), tol=2e-5)


def test_many_pieces_steps_and_spans(qkv, close, monkeypatch):
    monkeypatch.setattr(blocked, "PIECE", 32)
    monkeypatch.setattr(blocked, "LEAF", 16)
    monkeypatch.setattr(blocked, "PIECE_LEVEL", 32)
    monkeypatch.setattr(blocked, "STEP", 24)
    monkeypatch.setattr(blocked, "SPAN_BYTES", 1)
    q, k, v = qkv(2, 4, 2, 150, 170, 32, torch.bfloat16)
    active, gates = routing(2, 4, 150)
    for causal in (False, True):
        got = routed_attention(q, k, v, active, gates=gates, causal=causal, path="blocked")
        close(got, routed_reference(q, k, v, active, gates=gates, causal=causal))


def test_nothing_active_and_nothing_to_see(qkv):
    q, k, v = qkv(1, 4, 2, 40, 40, 16)
    none = torch.zeros(1, 4, 40, dtype=torch.bool)
    for path in ("dense", "blocked", "reference"):
        assert not bool(routed_attention(q, k, v, none, path=path).any())
        hidden = torch.zeros(1, 1, 1, 40, dtype=torch.bool)
        assert not bool(routed_attention(q, k, v, ~none, mask=hidden, path=path).any())
        empty = routed_attention(q, k[:, :, :0], v[:, :, :0], ~none, path=path)
        assert not bool(empty.any())
    assert routed_attention(q[:, :, :0], k, v, none[:, :, :0]).shape == (1, 4, 0, 16)


def test_same_bits_every_time_and_with_more_threads(qkv):
    q, k, v = qkv(1, 8, 2, 500, 500, 32)
    active, gates = routing(1, 8, 500)

    def call() -> Tensor:
        return routed_attention(q, k, v, active, gates=gates, causal=True, path="blocked")

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = call()
        assert torch.equal(call(), first)
        torch.set_num_threads(2)
        assert torch.equal(call(), first)
    finally:
        torch.set_num_threads(threads)


def test_nothing_unwritten_is_read(qkv, close, monkeypatch):
    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate(*args: Any, **kwargs: Any) -> Tensor:
            x = make(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return allocate

    q, k, v = qkv(2, 4, 2, 200, 200, 32)
    active, gates = routing(2, 4, 200)
    want = routed_reference(q, k, v, active, gates=gates, causal=True)
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    close(routed_attention(q, k, v, active, gates=gates, causal=True, path="blocked"), want)


@PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("causal", "pad"), [(True, None), (False, "right"), (True, "left"), (False, "any")])
def test_gradients(qkv, close, path, dtype, causal, pad):
    q, k, v = (x.requires_grad_() for x in qkv(2, 4, 2, 60, 75, 16, dtype))
    active, gates = routing(2, 4, 60)
    gates.requires_grad_()
    options: dict[str, Any] = {"gates": gates, "causal": causal, "mask": padding(2, 60, 75, pad), "shared": 1}
    leaves = (q, k, v, gates)
    wave = torch.randn(2, 4, 60, 16, generator=torch.Generator().manual_seed(9)).to(dtype)
    got = torch.autograd.grad(routed_attention(q, k, v, active, path=path, **options), leaves, wave)
    wanted = torch.autograd.grad(routed_reference(q, k, v, active, **options), leaves, wave.float())
    for a, b in zip(got, wanted, strict=True):
        close(a, b, tol=1e-5 if dtype == torch.float32 else 2e-2)
    off = ~active
    off[:, :1] = False
    assert not bool(got[0][off].any())
    assert not bool(got[3][off].any())


def test_gradient_without_gates_and_none_of_second_order(qkv, close):
    q, k, v = (x.requires_grad_() for x in qkv(1, 4, 4, 40, 40, 16))
    active, _ = routing(1, 4, 40)
    out = routed_attention(q, k, v, active, causal=True)
    (got,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    (want,) = torch.autograd.grad(routed_reference(q, k, v, active, causal=True).square().sum(), q)
    close(got, want, tol=1e-5)
    with pytest.raises(GradientError, match="no gradients of their own"):
        torch.autograd.grad(got.sum(), k)


def test_one_graph_and_registration(qkv):
    q, k, v = qkv(1, 4, 2, 100, 100, 32)
    active, gates = routing(1, 4, 100)

    def step(q: Tensor, k: Tensor, v: Tensor, active: Tensor, gates: Tensor) -> Tensor:
        return routed_attention(q * 2, k, v, active, gates=gates, causal=True, shared=1, path="blocked") + 1

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(q, k, v, active, gates), step(q, k, v, active, gates))
    op = torch.ops.patchkit.routed_attention.default
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for name in ("dense", "blocked"):
        args = (q.clone().requires_grad_(), k, v, active, gates, None, 1, 0.2, True, name)
        torch.library.opcheck(op, args, test_utils=checks)


def test_autocast_does_not_reach_inside(qkv, close):
    q, k, v = qkv(1, 4, 2, 100, 100, 32)
    active, _ = routing(1, 4, 100)
    with torch.autocast("cpu", torch.bfloat16):
        got = routed_attention(q, k, v, active, causal=True, path="blocked")
    close(got, routed_reference(q, k, v, active, causal=True))


def test_path_is_told_and_taken(qkv):
    q, k, _ = qkv(1, 4, 2, 4096, 4096, 1)
    active, _ = routing(1, 4, 4096, 0.4)
    path = routed_path(q, k, active)
    assert (path.name, path.pays) == ("blocked", True)
    assert "0.30 of the routed rows" in path.reason
    full = routed_path(q, k, torch.ones_like(active), 1)
    assert (full.name, full.pays) == ("dense", False)
    assert "too many" in full.reason
    assert "every head is shared" in routed_path(q, k, active, 4).reason
    for short in (q[:, :, :200], q[:, :, :1]):
        found = routed_path(short, k if short.shape[2] == 1 else k[:, :, :200], active[:, :, : short.shape[2]])
        assert found.name == "dense"
        assert "too short" in found.reason


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("pad", [None, "left"])
@pytest.mark.parametrize("G", [16, 4])
def test_one_query_reads_no_head_that_is_off(qkv, monkeypatch, G, pad, threads):
    """Decoding: dense attention of the heads that are on, and keys of the others are never touched."""
    H, M = 16, 2048
    q, k, v = qkv(2, H, G, 1, M, 64)
    active = torch.zeros(2, H, 1, dtype=torch.bool)
    active[0, 3:9] = active[1, 12] = True
    gates = torch.rand(2, H, 1) + 0.5
    mask = padding(2, 1, M, pad)
    assert routed_path(q, k, active, 2).name == "blocked"
    on = active.clone()
    on[:, :2] = True
    unread = ~on.view(2, G, H // G).any(-1)
    assert unread.float().mean() > 0.2
    wanted = routed_attention(q, k, v, active, shared=2, gates=gates, mask=mask, path="dense")
    k, v = (x.masked_fill(unread[..., None, None], float("nan")) for x in (k, v))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    found = routed_attention(q, k, v, active, shared=2, gates=gates, mask=mask)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    assert torch.equal(found != 0, wanted != 0)


def test_one_query_is_dense_where_all_keys_are_read(qkv):
    q, k, _ = qkv(1, 16, 16, 1, 2048, 64)
    most = torch.ones(1, 16, 1, dtype=torch.bool)
    most[:, -2:] = False
    found = routed_path(q, k, most)
    assert (found.name, found.pays) == ("dense", False)
    assert "0.88 of the key-value heads are read" in found.reason
    assert routed_path(q, k[:, :, :512], most.logical_not()).name == "dense"
    assert "one key-value head" in routed_path(q, k[:, :1], most).reason


@pytest.mark.parametrize(
    ("mask", "causal", "stair"),
    [
        (None, False, (6, 0, 0)),
        (None, True, (2, 0, 4)),
        ("left", True, (0, 0, 4)),
        ("right", True, (2, 0, 2)),
        ("right", False, (4, 0, 0)),
    ],
)
def test_padding_and_causality_need_no_mask(mask, causal, stair):
    key = torch.ones(1, 1, 1, 6, dtype=torch.bool)
    key[..., :2] &= mask != "left"
    key[..., -2:] &= mask != "right"
    (sight,) = sights_of(1, 4, 6, causal, None if mask is None else key, torch.device("cpu"))
    assert sight.stair() == stair
    if causal and mask:  # the same from a library's mask
        pairs = key & torch.ones(4, 6, dtype=torch.bool).tril(2)
        (sight,) = sights_of(1, 4, 6, False, pairs, torch.device("cpu"))
        assert sight.pairs is None
        assert sight.stair() == stair


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"active": torch.ones(1, 4, 8)}, KernelTypeError, "active is torch.float32"),
        ({"active": torch.ones(1, 4, 9, dtype=torch.bool)}, KernelValueError, r"Expected \(B, H, N\)"),
        ({"gates": torch.ones(1, 4, 8, dtype=torch.bool)}, KernelTypeError, "gates is torch.bool"),
        ({"gates": torch.ones(4, 8)}, KernelValueError, "gates"),
        ({"mask": torch.ones(1, 1, 1, 8)}, KernelTypeError, "bool mask"),
        ({"mask": torch.ones(1, 4, 8, 8, dtype=torch.bool)}, KernelValueError, "must broadcast"),
        ({"mask": torch.ones(1, 1, 1, 7, dtype=torch.bool)}, KernelValueError, "must broadcast"),
        ({"shared": 5}, KernelValueError, "5 shared heads of 4"),
        ({"path": "fast"}, KernelValueError, "path is 'fast'"),
        ({"k": torch.ones(1, 3, 8, 16), "v": torch.ones(1, 3, 8, 16)}, KernelValueError, "multiple of G"),
        ({"v": torch.ones(1, 2, 9, 16)}, KernelValueError, "v like k"),
        ({"v": torch.ones(1, 2, 8, 16).half()}, KernelTypeError, "one floating dtype"),
        ({"q": torch.ones(1, 4, 16, 8).transpose(2, 3)}, KernelValueError, "strided"),
        ({"active": torch.ones(1, 4, 8, dtype=torch.bool, device="meta")}, KernelValueError, "one device"),
    ],
)
def test_bad_input(change, error, match):
    args: dict[str, Any] = {"q": torch.ones(1, 4, 8, 16), "k": torch.ones(1, 2, 8, 16), "v": torch.ones(1, 2, 8, 16)}
    args["active"] = torch.ones(1, 4, 8, dtype=torch.bool)
    with pytest.raises(error, match=match):
        routed_attention(**(args | change))
