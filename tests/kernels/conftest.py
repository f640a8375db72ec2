"""Shared helpers of the kernel tests, as fixtures (test folders are not packages)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

# Relative RMS allowed per dtype: rounding of inputs and output dominates the low-precision ones.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def rms_error(actual: Tensor, expected: Tensor) -> float:
    """Relative RMS error; NaN anywhere in ``actual`` gives infinity."""
    a, e = actual.double(), expected.double()
    if not bool(torch.isfinite(a).all()):
        return float("inf")
    return float((a - e).norm() / e.norm().clamp_min(1e-12))


@pytest.fixture
def close() -> Callable[..., None]:
    """``close(actual, expected)``: relative RMS and norm ratio (a scaled output has a perfect cosine)."""

    def check(actual: Tensor, expected: Tensor, tol: float | None = None) -> None:
        assert actual.shape == expected.shape
        limit = TOLERANCE[actual.dtype] if tol is None else tol
        assert rms_error(actual, expected) <= limit
        norm = expected.double().norm()
        if norm > 0:
            assert abs(float(actual.double().norm() / norm) - 1) <= limit

    return check


@pytest.fixture
def close_lse() -> Callable[[Tensor, Tensor], None]:
    """Equal LSE: the same rows at -inf, the others within 1e-5."""

    def check(actual: Tensor, expected: Tensor) -> None:
        assert actual.dtype == torch.float32
        assert torch.equal(actual.isneginf(), expected.isneginf())
        live = ~expected.isneginf()
        assert torch.allclose(actual[live], expected[live], atol=1e-5, rtol=1e-5)

    return check


@pytest.fixture
def qkv() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """``qkv(B, H, Hkv, N, M, D, dtype)``: seeded q (B, H, N, D) and k, v (B, Hkv, M, D)."""

    def make(
        B: int, H: int, Hkv: int, N: int, M: int, D: int, dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        g = torch.Generator().manual_seed(seed)
        shapes = ((B, H, N, D), (B, Hkv, M, D), (B, Hkv, M, D))
        q, k, v = (torch.randn(s, generator=g).to(dtype) for s in shapes)
        return q, k, v

    return make


@pytest.fixture
def awkward_scores() -> Callable[..., Tensor]:
    """``awkward_scores(B, H, R, N)``: ties, zeros of both signs, infinities and NaN among numbers of both signs."""

    def make(*shape: int) -> Tensor:
        g = torch.Generator().manual_seed(sum(shape))
        scores = torch.randint(-3, 4, shape, generator=g).float() * torch.rand(shape, generator=g).round()
        odd = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0, 1e-45])
        choice = torch.randint(0, 40, shape, generator=g)
        scores = torch.where(choice < 5, odd[choice.clamp(max=4)], scores)
        scores[..., 0, :] = torch.rand(shape[-1], generator=g)  # a row of masses
        scores[..., -1, :] = float("nan")
        scores[..., -1, shape[-1] // 2] = float("-inf")
        return scores

    return make


@pytest.fixture(scope="session")
def check_topk() -> Callable[..., None]:
    """``check_topk(row_topk, scores, k, ...)``: the operator against sorting every row."""

    def check(row_topk: Callable[..., tuple[Tensor, Tensor]], scores: Tensor, k: int | Tensor, **extra: Any) -> None:
        from patchkit.kernels.topk.reference import row_topk_reference

        idx, num = row_topk(scores, k, **extra)
        width = extra.pop("width", None)
        forced = extra.pop("forced", None)
        forced = None if forced is None else forced.broadcast_to(scores.shape)
        table = torch.as_tensor(k).broadcast_to(scores.shape[:2])
        lists, counts = row_topk_reference(scores, table, forced=forced, **extra)
        assert torch.equal(num, counts)
        longest = scores.shape[-1] if forced is not None else min(int(table.max()), scores.shape[-1])
        assert idx.shape == (*scores.shape[:3], max(1, longest) if width is None else width)
        found = idx.flatten(0, 2).tolist()
        for row, wanted in zip(found, [row for sample in lists for head in sample for row in head], strict=True):
            stored = wanted[: len(row)]
            assert row == stored + [0] * (len(row) - len(stored))

    return check


@pytest.fixture
def unused_keys(qkv: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Callable[..., tuple[Any, ...]]:
    """``unused_keys(poisoned, D)``: q, k, v, a layout whose partial blocks hold keys of no segment, and these (2, 100).

    ``poisoned`` ("k" or "v") is NaN there.
    """

    def make(poisoned: str, D: int = 64) -> tuple[Any, ...]:
        from patchkit.kernels import BlockLayout

        ids = torch.arange(100).ge(50).long().expand(2, 100).contiguous()
        keys = ids.clone()
        keys[0, 90:], keys[1, 20:24] = -1, -1
        q, k, v = qkv(2, 2, 2, 100, 100, D)
        {"k": k, "v": v}[poisoned].masked_fill_(keys.lt(0).view(2, 1, 100, 1), float("nan"))
        return q, k, v, BlockLayout.from_segments(ids, keys, block_q=32, block_k=32), keys < 0

    return make
