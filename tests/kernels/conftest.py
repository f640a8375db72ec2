"""Shared helpers of the kernel tests, as fixtures (test folders are not packages)."""

from __future__ import annotations

from collections.abc import Callable

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
