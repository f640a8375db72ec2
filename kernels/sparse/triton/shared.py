"""What forward and backward have in common: entries of lists, rows of a head, the element rule of partial blocks."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def list_entry(idx, at, stop, implicit):
    """Entry ``at`` of a list, or of the implicit list 0, 1, 2, ...; what lies past ``stop`` is not read."""
    stored = tl.load(idx + at, mask=(at < stop) & (implicit == 0), other=0).to(tl.int32)
    return tl.where(implicit == 0, stored, at)


@triton.jit
def rows_of(head, pos, stop, stride, D: tl.constexpr, D_PAD: tl.constexpr, MASKED: tl.constexpr):
    """(n, D) rows ``pos`` of one head; with MASKED, rows from ``stop`` on are 0 and not read."""
    col = tl.arange(0, D_PAD)
    at = head + pos.to(tl.int64)[:, None] * stride + col[None, :]
    if MASKED:
        if D == D_PAD:
            return tl.load(at, mask=(pos < stop)[:, None], other=0.0)
        return tl.load(at, mask=(pos < stop)[:, None] & (col < D)[None, :], other=0.0)
    if D == D_PAD:
        return tl.load(at)
    return tl.load(at, mask=(col < D)[None, :], other=0.0)


@triton.jit
def allowed(
    q_pos, k_pos, q_ids, k_ids, words, shifts, offset, CAUSAL: tl.constexpr, SEGMENTS: tl.constexpr, BITS: tl.constexpr
):
    """The element rule; queries and keys along different dimensions, in either order. ``k_pos`` is -1 past the end."""
    ok = (k_pos >= 0) & (q_pos >= 0)
    if CAUSAL:
        ok = ok & (k_pos <= q_pos + offset)
    if SEGMENTS:
        ok = ok & (q_ids == k_ids) & (q_ids >= 0)
    if BITS:
        ok = ok & (((words >> shifts) & 1) != 0)
    return ok


@triton.jit
def kept_pairs(
    q_pos,
    q_ids,
    k_pos,
    keys,
    kv_seg,
    bits,
    at,
    inner,
    offset,
    CAUSAL: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BITS: tl.constexpr,
):
    """(BM, BN) pairs that attend, queries down, and (BN,) the keys' places; one in no segment is moved to the end.

    ``bits + at`` points at the words of the block for the rows of this tile (BM,). The tile begins ``inner`` keys into
    the block; BN <= 64, so it needs one word. Padding must not be read: a NaN there times a probability of 0 is NaN.
    """
    k_ids = k_pos
    words = k_pos[None, :]
    shifts = k_pos[None, :]
    if SEGMENTS:
        k_ids = tl.load(kv_seg + k_pos, mask=k_pos < keys, other=-1)
    if BITS:
        words = tl.load(bits + at + inner // 64)[:, None]
        shifts = (inner % 64 + tl.arange(0, k_pos.shape[0])).to(tl.int64)[None, :]
    known = tl.where(k_pos < keys, k_pos, -1)
    ok = allowed(
        q_pos[:, None], known[None, :], q_ids[:, None], k_ids[None, :], words, shifts, offset, CAUSAL, SEGMENTS, BITS
    )
    if SEGMENTS:
        k_pos = tl.where(k_ids < 0, keys, k_pos)
    return ok, k_pos
