"""The Triton kernel of dq: one program per tile of query rows, along the list of its row of blocks."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from .shared import kept_pairs, list_entry, rows_of


@triton.jit
def dq_walk(
    acc,
    q,
    do,
    shift,
    delta,
    k_head,
    v_head,
    k_n,
    v_n,
    idx,
    first,
    last,
    implicit,
    keys,
    q_pos,
    q_ids,
    kv_seg,
    bits,
    offset,
    scale2,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BN: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add to acc (BM, D) what entries first..last of a list of key blocks give; ``implicit``: block t is entry t."""
    SUB: tl.constexpr = BLOCK_K // BN
    WORDS: tl.constexpr = (BLOCK_K + 63) // 64
    block = list_entry(idx, first, last, implicit)
    for t in range(first * SUB, last * SUB):
        inner = (t % SUB) * BN
        k_pos = block * BLOCK_K + inner + tl.arange(0, BN)
        # The next entry is read a step ahead, so that no address waits for its own index.
        block = list_entry(idx, (t + 1) // SUB, last, implicit)
        if MASKED:
            ok, k_pos = kept_pairs(
                q_pos,
                q_ids,
                k_pos,
                keys,
                kv_seg,
                bits,
                (t // SUB) * (BLOCK_Q * WORDS),
                inner,
                offset,
                CAUSAL,
                SEGMENTS,
                BITS,
            )
        k = rows_of(k_head, k_pos, keys, k_n, D, D_PAD, MASKED)
        v = rows_of(v_head, k_pos, keys, v_n, D, D_PAD, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BM, BN)
        p = tl.exp2(s * scale2 - shift[:, None])
        if MASKED:
            p = tl.where(ok, p, 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
    return acc


@triton.jit
def dq_kernel(
    q,
    k,
    v,
    dout,
    shift,
    delta,
    dq,
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
    dout_b,
    dout_h,
    dout_n,
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
    offset,
    scale,
    scale2,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PARTIAL: tl.constexpr,
    CAUSAL: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BITS: tl.constexpr,
    LENGTHS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (B * H * Nq * tiles per block): dq (B, H, q_len, D), contiguous, for BM rows each.

    Strides are in elements; ``row_b`` and ``row_h`` count rows of the lists and are 0 where those are shared.
    """
    TILES: tl.constexpr = BLOCK_Q // BM
    WORDS: tl.constexpr = (BLOCK_K + 63) // 64
    item = tl.load(order + tl.program_id(0) // TILES)
    p, head = item % n_q, item // n_q
    h, b = (head % heads).to(tl.int64), (head // heads).to(tl.int64)
    row = b * row_b + h * row_h + p
    keys = kv_len
    if LENGTHS:
        keys = tl.load(kv_lens + b).to(tl.int32)
    local = (tl.program_id(0) % TILES) * BM + tl.arange(0, BM)
    q_pos = p * BLOCK_Q + local
    live = q_pos < q_len
    q_tile = rows_of(q + b * q_b + h * q_h, q_pos, q_len, q_n, D, D_PAD, True)
    do = rows_of(dout + b * dout_b + h * dout_h, q_pos, q_len, dout_n, D, D_PAD, True)
    at = (b * heads + h) * q_len + q_pos
    shift_row = tl.load(shift + at, mask=live, other=float("inf"))
    delta_row = tl.load(delta + at, mask=live, other=0.0)
    k_head = k + b * k_b + (h // group) * k_h
    v_head = v + b * v_b + (h // group) * v_h
    acc = tl.zeros([BM, D_PAD], tl.float32)

    blocks = (keys + BLOCK_K - 1) // BLOCK_K
    count = tl.load(kv_num + row)
    implicit = count == blocks
    idx = kv_idx + row * kv_width
    # Lists ascend, so only the last entry can be the ragged block.
    final = tl.load(idx + count - 1, mask=(count > 0) & (implicit == 0), other=-1).to(tl.int32)
    ragged = (count > 0) & (implicit | (final == blocks - 1)) & (keys % BLOCK_K != 0)
    even = tl.where(ragged, count - 1, count)
    acc = dq_walk(
        acc, q_tile, do, shift_row, delta_row, k_head, v_head, k_n, v_n, idx, 0, even, implicit, keys,
        q_pos, q_pos, kv_seg, part_bits, offset, scale2, D, D_PAD, BLOCK_Q, BLOCK_K, BN,
        False, False, False, False, PRECISION,
    )  # fmt: skip
    # The ragged block is the last one there is: entry blocks - 1 of the implicit list.
    tail = tl.where(ragged, blocks - 1, blocks)
    acc = dq_walk(
        acc, q_tile, do, shift_row, delta_row, k_head, v_head, k_n, v_n, idx, tail, blocks, tail >= 0, keys,
        q_pos, q_pos, kv_seg, part_bits, offset, scale2, D, D_PAD, BLOCK_Q, BLOCK_K, BN,
        True, False, False, False, PRECISION,
    )  # fmt: skip
    if PARTIAL:
        q_ids = q_pos
        segments = kv_seg
        bits = part_bits
        if SEGMENTS:
            q_ids = tl.load(q_seg + b * q_seg_b + q_pos, mask=live, other=-1)
            segments = kv_seg + b * kv_seg_b
        if BITS:
            bits = part_bits + (row * part_width * BLOCK_Q + local) * WORDS
        acc = dq_walk(
            acc, q_tile, do, shift_row, delta_row, k_head, v_head, k_n, v_n, part_idx + row * part_width, 0,
            tl.load(part_num + row), tail < 0, keys, q_pos, q_ids, segments, bits, offset, scale2,
            D, D_PAD, BLOCK_Q, BLOCK_K, BN, True, CAUSAL, SEGMENTS, BITS, PRECISION,
        )  # fmt: skip
    col = tl.arange(0, D_PAD)
    to = dq + at[:, None] * D + col[None, :]
    tl.store(to, (acc * scale).to(dq.dtype.element_ty), mask=live[:, None] & (col < D)[None, :])
