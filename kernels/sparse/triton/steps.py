"""What the Triton kernels of block-sparse attention have in common: one online-softmax step, walks over lists, the end.

The state of a tile of rows is m (BM,), the largest logit so far in base 2, den (BM,), the sum of exponentials, and
acc (BM, D), all fp32. Shapes in comments: BM query rows, BN keys, D padded head size.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from .shared import kept_pairs, list_entry, rows_of


@triton.jit
def tile_step(q, k, v, ok, m, den, acc, scale2, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """One online-softmax step: q (BM, D), k and v (BN, D), ok (BM, BN) or (1, BN); the state m, den (BM,), acc (BM, D).

    Logits are kept in base 2 and unscaled: scale2 = scale * log2(e) > 0 enters with the subtraction, as one FMA.
    """
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BM, BN)
    if MASKED:
        s = tl.where(ok, s, float("-inf"))
    top = tl.maximum(m, tl.max(s, 1) * scale2)
    base = top
    if MASKED:
        # A row without any key so far: keep m at -inf, but never compute -inf - -inf.
        base = tl.where(top == float("-inf"), 0.0, top)
    p = tl.exp2(s * scale2 - base[:, None])
    alpha = tl.exp2(m - base)
    den = den * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return top, den, acc


@triton.jit
def load_tile(head, start, stride, inside, D: tl.constexpr, D_PAD: tl.constexpr, BN: tl.constexpr, ROWS: tl.constexpr):
    """(BN, D_PAD) rows ``start``.. of one head; rows where ``inside`` is false (if ROWS) and the padding of D are 0."""
    row, col = tl.arange(0, BN), tl.arange(0, D_PAD)
    at = head + start.to(tl.int64) * stride + (row[:, None] * stride + col[None, :])
    if ROWS:
        if D == D_PAD:
            return tl.load(at, mask=inside[:, None], other=0.0)
        return tl.load(at, mask=inside[:, None] & (col < D)[None, :], other=0.0)
    if D == D_PAD:
        return tl.load(at)
    return tl.load(at, mask=(col < D)[None, :], other=0.0)


@triton.jit
def walk_full(
    q,
    m,
    den,
    acc,
    k_head,
    v_head,
    k_stride,
    v_stride,
    idx,
    first,
    last,
    implicit,
    scale2,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Entries first..last of a list, every key of them valid: the main loop, without any mask."""
    SUB: tl.constexpr = BLOCK_K // BN
    block = list_entry(idx, first, last, implicit)
    for t in range(first * SUB, last * SUB):
        start = block * BLOCK_K + (t % SUB) * BN
        # The next entry is read one step ahead: an address that waits for its own index would stall every step.
        block = list_entry(idx, (t + 1) // SUB, last, implicit)
        k = load_tile(k_head, start, k_stride, None, D, D_PAD, BN, False)
        v = load_tile(v_head, start, v_stride, None, D, D_PAD, BN, False)
        m, den, acc = tile_step(q, k, v, None, m, den, acc, scale2, False, PRECISION)
    return m, den, acc


@triton.jit
def walk_tail(
    q,
    m,
    den,
    acc,
    k_head,
    v_head,
    k_stride,
    v_stride,
    start,
    stop,
    scale2,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Keys start..stop, fewer than a block: the ragged end of the sequence. Nothing behind ``stop`` is read."""
    # One step unless a block is walked in several tiles; a pipeline would cost more shared memory than it hides.
    for t in tl.range(0, (stop - start + BN - 1) // BN, num_stages=1):
        n = start + t * BN
        inside = n + tl.arange(0, BN) < stop
        k = load_tile(k_head, n, k_stride, inside, D, D_PAD, BN, True)
        v = load_tile(v_head, n, v_stride, inside, D, D_PAD, BN, True)
        m, den, acc = tile_step(q, k, v, inside[None, :], m, den, acc, scale2, True, PRECISION)
    return m, den, acc


@triton.jit
def walk_list(
    q,
    m,
    den,
    acc,
    k_head,
    v_head,
    k_stride,
    v_stride,
    idx,
    first,
    last,
    implicit,
    keys,
    scale2,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Entries first..last of a list of full blocks: all but a ragged last one without a mask, then that one."""
    blocks = (keys + BLOCK_K - 1) // BLOCK_K
    # Lists ascend, so only the last entry can be the ragged block.
    final = list_entry(idx, tl.maximum(last - 1, 0), last, implicit)
    ragged = (first < last) & (final == blocks - 1) & (keys % BLOCK_K != 0)
    even = tl.where(ragged, last - 1, last)
    m, den, acc = walk_full(
        q,
        m,
        den,
        acc,
        k_head,
        v_head,
        k_stride,
        v_stride,
        idx,
        first,
        even,
        implicit,
        scale2,
        D,
        D_PAD,
        BLOCK_K,
        BN,
        PRECISION,
    )
    start = tl.where(ragged, (blocks - 1) * BLOCK_K, keys)
    return walk_tail(q, m, den, acc, k_head, v_head, k_stride, v_stride, start, keys, scale2, D, D_PAD, BN, PRECISION)


@triton.jit
def walk_partial(
    q,
    m,
    den,
    acc,
    k_head,
    v_head,
    k_stride,
    v_stride,
    idx,
    first,
    last,
    q_pos,
    keys,
    bits,
    q_ids,
    kv_seg,
    causal_offset,
    scale2,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BN: tl.constexpr,
    CAUSAL: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Entries first..last of a list of partial blocks, under all the element rules there are.

    ``bits`` points at the row words of entry 0 for the rows of this tile (BM,).
    """
    SUB: tl.constexpr = BLOCK_K // BN
    WORDS: tl.constexpr = (BLOCK_K + 63) // 64
    block = list_entry(idx, first, last, 0)
    for t in range(first * SUB, last * SUB):
        inner = (t % SUB) * BN
        k_pos = block * BLOCK_K + inner + tl.arange(0, BN)
        block = list_entry(idx, (t + 1) // SUB, last, 0)
        ok, k_pos = kept_pairs(
            q_pos,
            q_ids,
            k_pos,
            keys,
            kv_seg,
            bits,
            (t // SUB) * (BLOCK_Q * WORDS),
            inner,
            causal_offset,
            CAUSAL,
            SEGMENTS,
            BITS,
        )
        k = rows_of(k_head, k_pos, keys, k_stride, D, D_PAD, True)
        v = rows_of(v_head, k_pos, keys, v_stride, D, D_PAD, True)
        m, den, acc = tile_step(q, k, v, ok, m, den, acc, scale2, True, PRECISION)
    return m, den, acc


@triton.jit
def list_range(count, split, splits):
    """The part of a list of ``count`` entries that split number ``split`` takes."""
    size = (count + splits - 1) // splits
    first = tl.minimum(split * size, count)
    return first, tl.minimum(first + size, count)


@triton.jit
def store_tile(m, den, acc, out_head, lse_head, q_pos, live, out_n, D: tl.constexpr, D_PAD: tl.constexpr):
    """Write the normalised rows and their natural-log LSE; a row without keys is 0 and -inf, a NaN row stays NaN."""
    empty = den == 0.0
    den = tl.where(empty, 1.0, den)  # acc is 0 there
    acc = acc / den[:, None]
    found = tl.where(empty, float("-inf"), (m + tl.log2(den)) * 0.6931471805599453)
    col = tl.arange(0, D_PAD)
    at = out_head + q_pos.to(tl.int64)[:, None] * out_n + col[None, :]
    tl.store(at, acc.to(out_head.dtype.element_ty), mask=live[:, None] & (col < D)[None, :])
    tl.store(lse_head + q_pos, found, mask=live)
