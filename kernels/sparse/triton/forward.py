"""Triton kernels of block-sparse attention: online softmax over lists of key blocks (AdaSpa, arXiv 2502.21079, eq. 12).

One program attends one tile of query rows to the key blocks of its list. What needs no element mask runs in a loop
without one; the ragged last key block and the partial blocks follow in loops of their own. The steps are in
``steps.py``, the host side (which lists, which tile, which grid) in ``launch.py``.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from .steps import list_range, store_tile, walk_list, walk_partial


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    begun,
    begun_lse,
    kv_idx,
    kv_num,
    part_idx,
    part_num,
    part_bits,
    q_seg,
    kv_seg,
    kv_lens,
    order,
    q_b,
    q_h,
    q_n,
    k_b,
    k_h,
    k_n,
    v_b,
    v_h,
    v_n,
    out_s,
    out_b,
    out_h,
    out_n,
    lse_s,
    row_b,
    row_h,
    kv_width,
    part_width,
    q_seg_b,
    kv_seg_b,
    heads,
    group,
    n_q,
    q_len,
    kv_len,
    causal_offset,
    splits,
    sign,
    scale2,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BP: tl.constexpr,
    RESUME: tl.constexpr,
    PARTIAL: tl.constexpr,
    CAUSAL: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BITS: tl.constexpr,
    LENGTHS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (work items * tiles per row block, splits): BM query rows over their list, or over one part of it.

    Strides are in elements; ``row_b`` and ``row_h`` count rows of the lists and are 0 where those are shared. ``lse``
    is (splits, B, H, q_len). ``begun`` (B, H, q_len, D) and ``begun_lse`` (B, H, q_len), contiguous fp32, are the
    result over other keys to go on from (RESUME, one split). ``sign`` is that of the scale: it goes into q, so that
    ``scale2`` is positive.
    """
    TILES: tl.constexpr = BLOCK_Q // BM
    item = tl.load(order + tl.program_id(0) // TILES)
    split = tl.program_id(1)
    p, head = item % n_q, item // n_q
    h, b = (head % heads).to(tl.int64), (head // heads).to(tl.int64)
    row = b * row_b + h * row_h + p
    keys = kv_len
    if LENGTHS:
        keys = tl.load(kv_lens + b).to(tl.int32)

    local = (tl.program_id(0) % TILES) * BM + tl.arange(0, BM)  # rows within the row block
    q_pos = p * BLOCK_Q + local
    col = tl.arange(0, D_PAD)
    live = q_pos < q_len
    at = q + b * q_b + h * q_h + q_pos.to(tl.int64)[:, None] * q_n + col[None, :]
    q_tile = tl.load(at, mask=live[:, None] & (col < D)[None, :], other=0.0)
    q_tile = (q_tile * sign).to(q.dtype.element_ty)
    k_head = k + b * k_b + (h // group) * k_h
    v_head = v + b * v_b + (h // group) * v_h

    m = tl.full([BM], float("-inf"), tl.float32)
    den = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D_PAD], tl.float32)
    if RESUME:
        # A normalised result is a state whose denominator is 1, or 0 where there was no key.
        rows = (b * heads + h) * q_len + q_pos
        m = tl.load(begun_lse + rows, mask=live, other=float("-inf")) * 1.4426950408889634
        den = tl.where(m == float("-inf"), 0.0, 1.0)
        acc = tl.load(begun + rows[:, None] * D + col[None, :], mask=live[:, None] & (col < D)[None, :], other=0.0)

    blocks = (keys + BLOCK_K - 1) // BLOCK_K
    count = tl.load(kv_num + row)
    first, last = list_range(count, split, splits)
    m, den, acc = walk_list(
        q_tile,
        m,
        den,
        acc,
        k_head,
        v_head,
        k_n,
        v_n,
        kv_idx + row * kv_width,
        first,
        last,
        count == blocks,
        keys,
        scale2,
        D,
        D_PAD,
        BLOCK_K,
        BN,
        PRECISION,
    )
    if PARTIAL:
        WORDS: tl.constexpr = (BLOCK_K + 63) // 64
        first, last = list_range(tl.load(part_num + row), split, splits)
        bits = part_bits
        q_ids = q_pos
        segments = kv_seg
        if BITS:
            bits = part_bits + (row * part_width * BLOCK_Q + local) * WORDS
        if SEGMENTS:
            q_ids = tl.load(q_seg + b * q_seg_b + q_pos, mask=live, other=-1)
            segments = kv_seg + b * kv_seg_b
        m, den, acc = walk_partial(
            q_tile,
            m,
            den,
            acc,
            k_head,
            v_head,
            k_n,
            v_n,
            part_idx + row * part_width,
            first,
            last,
            q_pos,
            keys,
            bits,
            q_ids,
            segments,
            causal_offset,
            scale2,
            D,
            D_PAD,
            BLOCK_Q,
            BLOCK_K,
            BP,
            CAUSAL,
            SEGMENTS,
            BITS,
            PRECISION,
        )
    store_tile(
        m,
        den,
        acc,
        out + split * out_s + b * out_b + h * out_h,
        lse + split * lse_s + (b * heads + h) * q_len,
        q_pos,
        live,
        out_n,
        D,
        D_PAD,
    )


@triton.jit
def merge_kernel(
    part,
    part_lse,
    out,
    lse,
    part_s,
    lse_s,
    out_b,
    out_h,
    out_n,
    heads,
    q_len,
    splits,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BM: tl.constexpr,
):
    """Grid (tiles of q_len, B * H): the exact union of the splits of BM rows, added in ascending order.

    part (splits, B, H, q_len, D) and part_lse (splits, B, H, q_len) are contiguous fp32.
    """
    bh = tl.program_id(1).to(tl.int64)
    q_pos = tl.program_id(0) * BM + tl.arange(0, BM)
    live = q_pos < q_len
    col = tl.arange(0, D_PAD)
    inside = live[:, None] & (col < D)[None, :]
    rows = bh * q_len + q_pos
    top = tl.full([BM], float("-inf"), tl.float32)
    at = part_lse + rows
    for _ in range(splits):
        top = tl.maximum(top, tl.load(at, mask=live, other=float("-inf")))
        at += lse_s
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D_PAD], tl.float32)
    at = part_lse + rows
    values = part + rows[:, None] * D + col[None, :]
    for _ in range(splits):
        weight = tl.exp(tl.load(at, mask=live, other=float("-inf")) - base)
        total += weight
        acc += weight[:, None] * tl.load(values, mask=inside, other=0.0)
        at += lse_s
        values += part_s
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)  # acc is 0 there
    acc = acc / total[:, None]
    to = out + (bh // heads) * out_b + (bh % heads) * out_h + q_pos.to(tl.int64)[:, None] * out_n + col[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=inside)
    tl.store(lse + rows, tl.where(empty, float("-inf"), tl.log(total) + base), mask=live)
