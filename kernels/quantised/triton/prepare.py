"""One pass over Q, K and V: smoothing, rounding, scales, and the order of each head's tokens, all at once.

What is written is padded with zeros to whole groups, so that the attention kernel loads it without a mask. Values are
written transposed: 8-bit products take their second operand so.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from ...reorder.triton import place_of
from ..formats import FLOOR

LEAST = tl.constexpr(FLOOR)


@triton.jit
def _tokens(x, x_b, x_h, x_n, mean, table, b, h, kv, kv_heads, n, keys, start, stop, D, D_PAD, REORDER, MEAN):
    """(rows, D_PAD) fp32 tokens n of one head less their mean; 0 from ``keys`` on and in the padding of D."""
    col = tl.arange(0, D_PAD)
    place = n
    if REORDER:
        place = place_of(n, table, h, start, stop)
    inside = (n < keys)[:, None] & (col < D)[None, :]
    at = x + b * x_b + kv * x_h + place.to(tl.int64)[:, None] * x_n + col[None, :]
    rows = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if MEAN:
        centre = tl.load(mean + (b * kv_heads + kv) * D + col, mask=col < D, other=0.0)
        rows = tl.where(inside, rows - centre[None, :], 0.0)
    return rows


@triton.jit
def rows_kernel(
    x,
    mean,
    table,
    lens,
    out,
    scales,
    shift,
    x_b,
    x_h,
    x_n,
    heads,
    group,
    mean_heads,
    mean_group,
    start,
    stop,
    N,
    groups,
    factor,
    natural,
    top,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    GROUP: tl.constexpr,
    REORDER: tl.constexpr,
    SMOOTH: tl.constexpr,
    SHIFT: tl.constexpr,
    LENGTHS: tl.constexpr,
):
    """Grid (groups * B * heads): GROUP tokens of Q or K to 8 bits with one scale.

    ``out`` is (B, heads, groups * GROUP, D_PAD), ``scales`` (B, heads, groups), ``shift`` (B, heads, N). SMOOTH takes
    ``mean`` (B, mean heads, D) off (keys); SHIFT notes its product with the row, times ``natural`` (queries).
    """
    g, bh = tl.program_id(0) % groups, tl.program_id(0) // groups
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    n, col = g * GROUP + tl.arange(0, GROUP), tl.arange(0, D_PAD)
    keys = N
    if LENGTHS:
        keys = tl.load(lens + b).to(tl.int32)
    rows = _tokens(
        x, x_b, x_h, x_n, mean, table, b, h, h // group, mean_heads, n, keys, start, stop, D, D_PAD, REORDER, SMOOTH
    )
    if SHIFT:
        centre = tl.load(mean + (b * mean_heads + h // mean_group) * D + col, mask=col < D, other=0.0)
        moved = tl.sum(rows * centre[None, :], 1) * natural
        tl.store(shift + bh.to(tl.int64) * N + n, moved, mask=n < N)
    rows = rows * factor
    scale = tl.maximum(tl.max(tl.max(tl.abs(rows), 1), 0), LEAST) / top
    whole = tl.minimum(tl.maximum(tl.floor(rows / scale + 0.5), -top), top)
    at = out + ((bh.to(tl.int64) * groups + g) * GROUP + tl.arange(0, GROUP)[:, None]) * D_PAD + col[None, :]
    tl.store(at, whole.to(tl.int8))
    tl.store(scales + bh.to(tl.int64) * groups + g, scale)


@triton.jit
def values_kernel(
    x,
    mean,
    scales,
    table,
    lens,
    out,
    x_b,
    x_h,
    x_n,
    heads,
    group,
    kv_heads,
    start,
    stop,
    N,
    padded,
    top,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BN: tl.constexpr,
    REORDER: tl.constexpr,
    SMOOTH: tl.constexpr,
    LENGTHS: tl.constexpr,
):
    """Grid (padded / BN * B * heads): values to 8 bits by channel, transposed: out (B, heads, D_PAD, padded).

    ``mean`` and ``scales`` are (B, kv heads, D).
    """
    tiles = padded // BN
    tile, bh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    n, col = tile * BN + tl.arange(0, BN), tl.arange(0, D_PAD)
    keys = N
    if LENGTHS:
        keys = tl.load(lens + b).to(tl.int32)
    kv = h // group
    rows = _tokens(x, x_b, x_h, x_n, mean, table, b, h, kv, kv_heads, n, keys, start, stop, D, D_PAD, REORDER, SMOOTH)
    scale = tl.load(scales + (b * kv_heads + kv) * D + col, mask=col < D, other=1.0)
    made = rows / scale[None, :]
    if out.dtype.element_ty == tl.int8:
        made = tl.minimum(tl.maximum(tl.floor(made + 0.5), -top), top)
    else:
        made = tl.minimum(tl.maximum(made, -top), top)
    at = out + (bh.to(tl.int64) * D_PAD + col[:, None]) * padded + n[None, :]
    tl.store(at, tl.trans(made).to(out.dtype.element_ty))
