"""Triton kernels of the backward of block-sparse attention; the formula is in ``backward_reference.py``.

Three launches: per-row constants; dq, along the lists of the forward; dk and dv, along the transposed lists, for all
query heads that share a KV head. Each output tile belongs to one program, which adds to it in a fixed order: no
atomics, the same bits in every run. The host side is ``triton_backward_launch.py``. Shapes in comments: BM query rows,
BN keys, D padded head size.
"""

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
def allowed(q_pos, k_pos, q_ids, k_ids, words, shifts, offset, CAUSAL: tl.constexpr, SEGMENTS: tl.constexpr, BITS: tl.constexpr):
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
    block = tl.load(idx + first, mask=(first < last) & (implicit == 0), other=0).to(tl.int32)
    block = tl.where(implicit, first, block)
    for t in range(first * SUB, last * SUB):
        inner = (t % SUB) * BN
        k_pos = block * BLOCK_K + inner + tl.arange(0, BN)
        # The next entry is read a step ahead, so that no address waits for its own index.
        after = (t + 1) // SUB
        block = tl.load(idx + after, mask=(after < last) & (implicit == 0), other=0).to(tl.int32)
        block = tl.where(implicit, after, block)
        k = rows_of(k_head, k_pos, keys, k_n, D, D_PAD, MASKED)
        v = rows_of(v_head, k_pos, keys, v_n, D, D_PAD, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BM, BN)
        p = tl.exp2(s * scale2 - shift[:, None])
        if MASKED:
            k_ids = k_pos
            words = k_pos[None, :]
            shifts = k_pos[None, :]
            if SEGMENTS:
                k_ids = tl.load(kv_seg + k_pos, mask=k_pos < keys, other=-1)
            if BITS:
                words = tl.load(bits + (t // SUB) * (BLOCK_Q * WORDS) + inner // 64)[:, None]
                shifts = (inner % 64 + tl.arange(0, BN)).to(tl.int64)[None, :]
            known = tl.where(k_pos < keys, k_pos, -1)
            p = tl.where(
                allowed(
                    q_pos[:, None],
                    known[None, :],
                    q_ids[:, None],
                    k_ids[None, :],
                    words,
                    shifts,
                    offset,
                    CAUSAL,
                    SEGMENTS,
                    BITS,
                ),
                p,
                0.0,
            )
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
    for t in range(0, n * SUB):
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
            p = tl.where(
                allowed(
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
                ),
                p,
                0.0,
            )
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        if NEED_K:
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            ds = p * (dp - less[None, :])
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
    for i in range(0, group):
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
