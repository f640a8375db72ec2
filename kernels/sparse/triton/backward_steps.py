"""Triton backward of block-sparse attention: per-row constants, and what dq and dk/dv share.

Three launches: this one's rows; dq, along the lists of the forward (``backward_q.py``); dk and dv, along the
transposed lists, for all query heads that share a KV head (``backward_kv.py``). Each output tile belongs to one
program, which adds to it in a fixed order: no atomics, the same bits in every run. The formula is in
``backward_reference.py``, the host side in ``backward_launch.py``. Shapes in comments: BM query rows, BN keys,
D padded head size.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows_kernel(
    out,
    dout,
    lse,
    dlse,
    shift,
    delta,
    out_b,
    out_h,
    out_n,
    dout_b,
    dout_h,
    dout_n,
    heads,
    q_len,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BM: tl.constexpr,
    WITH_LSE: tl.constexpr,
):
    """Grid (tiles of q_len, B * H): what the other kernels need of each row, both (B, H, q_len) fp32.

    shift: the LSE in base 2, or +inf for a row without keys, whose probabilities then come out as 0.
    delta: rowsum(dO * O) - dLSE, or 0 for such a row.
    """
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    pos = tl.program_id(0) * BM + tl.arange(0, BM)
    live = pos < q_len
    col = tl.arange(0, D_PAD)
    inside = live[:, None] & (col < D)[None, :]
    far = pos.to(tl.int64)[:, None]
    o = tl.load(out + b * out_b + h * out_h + far * out_n + col[None, :], mask=inside, other=0.0)
    do = tl.load(dout + b * dout_b + h * dout_h + far * dout_n + col[None, :], mask=inside, other=0.0)
    found = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    at = bh * q_len + pos
    value = tl.load(lse + at, mask=live, other=0.0)
    if WITH_LSE:
        found -= tl.load(dlse + at, mask=live, other=0.0)
    empty = value == float("-inf")
    tl.store(shift + at, tl.where(empty, float("inf"), value * 1.4426950408889634), mask=live)
    tl.store(delta + at, tl.where(empty, 0.0, found), mask=live)
