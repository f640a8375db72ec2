"""The Triton kernel of dk and dv: one program per tile of keys, along the query blocks that attend to them."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from .shared import allowed, rows_of


@triton.jit
def query_block(shared, lists, t, n_shared, n):
    """Entry ``t`` of the complete rows followed by a key block's own list; past the end nothing is read."""
    a = tl.load(shared + t, mask=t < n_shared, other=0).to(tl.int32)
    b = tl.load(lists + t - n_shared, mask=(t >= n_shared) & (t < n), other=0).to(tl.int32)
    return tl.where(t < n_shared, a, b)


@triton.jit
def dkv_walk(
    dk,
    dv,
    k,
    v,
    q_head,
    do_head,
    shift,
    delta,
    q_n,
    dout_n,
    shared,
    n_shared,
    lists,
    n,
    slots,
    q_len,
    known,
    k_ids,
    q_seg,
    bits,
    inner,
    part_width,
    offset,
    scale2,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    EVEN: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BITS: tl.constexpr,
    NEED_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add to dk, dv (BN, D) what the listed query blocks of one head give. Everything is transposed: keys are rows."""
    SUB: tl.constexpr = BLOCK_Q // BM
    WORDS: tl.constexpr = (BLOCK_K + 63) // 64
    block = query_block(shared, lists, 0, n_shared, n)
    for t in range(n * SUB):
        local = (t % SUB) * BM + tl.arange(0, BM)
        q_pos = block * BLOCK_Q + local
        row = block
        block = query_block(shared, lists, (t + 1) // SUB, n_shared, n)
        q = rows_of(q_head, q_pos, q_len, q_n, D, D_PAD, not EVEN)
        do = rows_of(do_head, q_pos, q_len, dout_n, D, D_PAD, not EVEN)
        if EVEN:
            up = tl.load(shift + q_pos)
            less = tl.load(delta + q_pos)
        else:
            # A row past the end has probability exp2(-inf) = 0.
            up = tl.load(shift + q_pos, mask=q_pos < q_len, other=float("inf"))
            less = tl.load(delta + q_pos, mask=q_pos < q_len, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # (BN, BM)
        p = tl.exp2(s * scale2 - up[None, :])
        if MASKED:
            q_ids = q_pos
            words = q_pos[None, :]
            shifts = q_pos[None, :]
            if SEGMENTS:
                q_ids = tl.load(q_seg + q_pos, mask=q_pos < q_len, other=-1)
            if BITS:
                slot = tl.load(slots + t // SUB).to(tl.int64)
                at = ((row * part_width + slot) * BLOCK_Q + local) * WORDS + inner // 64
                words = tl.load(bits + at)[None, :]
                shifts = (inner % 64 + tl.arange(0, BN)).to(tl.int64)[:, None]
            ok = allowed(
                q_pos[None, :],
                known[:, None],
                q_ids[None, :],
                k_ids[:, None],
                words,
                shifts,
                offset,
                CAUSAL,
                SEGMENTS,
                BITS,
            )
            p = tl.where(ok, p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        if NEED_K:
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            ds = p * (dp - less[None, :])
            if MASKED:
                ds = tl.where(ok, ds, 0.0)  # the value of a key that is masked may be NaN
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def dkv_kernel(
    q,
    k,
    v,
    dout,
    shift,
    delta,
    dk,
    dv,
    complete_idx,
    complete_num,
    full_idx,
    full_start,
    full_num,
    part_idx,
    part_slot,
    part_start,
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
    list_b,
    list_h,
    complete_width,
    part_width,
    q_seg_b,
    kv_seg_b,
    heads,
    group,
    n_q,
    n_k,
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
    EVEN: tl.constexpr,
    PARTIAL: tl.constexpr,
    CAUSAL: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BITS: tl.constexpr,
    LENGTHS: tl.constexpr,
    NEED_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (B * Hkv * Nk * tiles per block): dk and dv (B, Hkv, kv_len, D), contiguous, for BN keys each.

    ``list_b`` and ``list_h`` count heads of the lists and are 0 where those are shared. EVEN: no ragged query block.
    Keys that nothing attends to, and those past the end of a sample, get 0.
    """
    TILES: tl.constexpr = BLOCK_K // BN
    item = tl.load(order + tl.program_id(0) // TILES)
    j, head = item % n_k, item // n_k
    kv_heads = heads // group
    g, b = (head % kv_heads).to(tl.int64), (head // kv_heads).to(tl.int64)
    keys = kv_len
    if LENGTHS:
        keys = tl.load(kv_lens + b).to(tl.int32)
    inner = (tl.program_id(0) % TILES) * BN
    k_pos = j * BLOCK_K + inner + tl.arange(0, BN)
    k_tile = rows_of(k + b * k_b + g * k_h, k_pos, keys, k_n, D, D_PAD, True)
    v_tile = rows_of(v + b * v_b + g * v_h, k_pos, keys, v_n, D, D_PAD, True)
    # Rows of keys past the end hold numbers of no meaning until the end, where they are not written.
    acc_k = tl.zeros([BN, D_PAD], tl.float32)
    acc_v = tl.zeros([BN, D_PAD], tl.float32)
    blocks = (keys + BLOCK_K - 1) // BLOCK_K
    known = tl.where(k_pos < keys, k_pos, -1)
    k_ids = k_pos
    if SEGMENTS:
        k_ids = tl.load(kv_seg + b * kv_seg_b + k_pos, mask=k_pos < keys, other=-1)
    for i in range(group):
        h = g * group + i
        at_head = b * list_b + h * list_h
        at = at_head * n_k + j
        rows = (b * heads + h) * q_len
        q_head = q + b * q_b + h * q_h
        do_head = dout + b * dout_b + h * dout_h
        n_shared = tl.where(j < blocks, tl.load(complete_num + at_head), 0)
        n_full = tl.load(full_num + at)
        acc_k, acc_v = dkv_walk(
            acc_k, acc_v, k_tile, v_tile, q_head, do_head, shift + rows, delta + rows, q_n, dout_n,
            complete_idx + at_head * complete_width, n_shared, full_idx + tl.load(full_start + at), n_shared + n_full,
            full_idx, q_len, known, k_ids, q_seg, part_bits, inner, part_width, offset, scale2,
            D, D_PAD, BLOCK_Q, BLOCK_K, BM, BN, EVEN, False, False, False, False, NEED_K, PRECISION,
        )  # fmt: skip
        if PARTIAL:
            WORDS: tl.constexpr = (BLOCK_K + 63) // 64
            start = tl.load(part_start + at)
            segments = q_seg
            bits = part_bits
            slots = full_idx
            if SEGMENTS:
                segments = q_seg + b * q_seg_b
            if BITS:
                bits = part_bits + at_head * n_q * part_width * BLOCK_Q * WORDS
                slots = part_slot + start
            acc_k, acc_v = dkv_walk(
                acc_k, acc_v, k_tile, v_tile, q_head, do_head, shift + rows, delta + rows, q_n, dout_n,
                part_idx, 0, part_idx + start, tl.load(part_num + at),
                slots, q_len, known, k_ids, segments, bits, inner, part_width, offset, scale2,
                D, D_PAD, BLOCK_Q, BLOCK_K, BM, BN, EVEN, True, CAUSAL, SEGMENTS, BITS, NEED_K, PRECISION,
            )  # fmt: skip
    col = tl.arange(0, D_PAD)
    valid = (k_pos < keys)[:, None]
    to = ((b * kv_heads + g) * kv_len + k_pos)[:, None] * D + col[None, :]
    inside = (k_pos < kv_len)[:, None] & (col < D)[None, :]
    tl.store(dv + to, tl.where(valid, acc_v, 0.0).to(dv.dtype.element_ty), mask=inside)
    if NEED_K:
        tl.store(dk + to, tl.where(valid, acc_k * scale, 0.0).to(dk.dtype.element_ty), mask=inside)
