"""Triton kernels of block-sparse attention: online softmax over lists of key blocks (AdaSpa, arXiv 2502.21079, eq. 12).

One program attends one tile of query rows to the key blocks of its list. What needs no element mask runs in a loop
without one; the ragged last key block and the partial blocks follow in loops of their own. The host side (which lists,
which tile, which grid) is ``triton_launch.py``. Shapes in comments: BM query rows, BN keys, D padded head size.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl


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
def list_entry(idx, at, stop, implicit):
    """Entry ``at`` of a list, or of the implicit list 0, 1, 2, ...; what lies past ``stop`` is not read."""
    stored = tl.load(idx + at, mask=(at < stop) & (implicit == 0), other=0).to(tl.int32)
    return tl.where(implicit, at, stored)


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

    ``bits`` points at the row words of entry 0 for the rows of this tile (BM,); BN <= 64, so a step needs one word.
    """
    SUB: tl.constexpr = BLOCK_K // BN
    WORDS: tl.constexpr = (BLOCK_K + 63) // 64
    block = tl.load(idx + first, mask=first < last, other=0).to(tl.int32)
    for t in range(first * SUB, last * SUB):
        inner = (t % SUB) * BN
        start = block * BLOCK_K + inner
        block = tl.load(idx + (t + 1) // SUB, mask=(t + 1) // SUB < last, other=0).to(tl.int32)
        k_pos = start + tl.arange(0, BN)
        inside = k_pos < keys
        ok = tl.broadcast_to(inside[None, :], (q.shape[0], BN))
        if CAUSAL:
            ok = ok & (k_pos[None, :] <= q_pos[:, None] + causal_offset)
        if SEGMENTS:
            k_ids = tl.load(kv_seg + k_pos, mask=inside, other=-1)
            ok = ok & (q_ids[:, None] == k_ids[None, :]) & (q_ids >= 0)[:, None]
        if BITS:
            word = tl.load(bits + (t // SUB) * (BLOCK_Q * WORDS) + inner // 64)
            shift = (inner % 64 + tl.arange(0, BN)).to(tl.int64)
            ok = ok & (((word[:, None] >> shift[None, :]) & 1) != 0)
        k = load_tile(k_head, start, k_stride, inside, D, D_PAD, BN, True)
        v = load_tile(v_head, start, v_stride, inside, D, D_PAD, BN, True)
        m, den, acc = tile_step(q, k, v, ok, m, den, acc, scale2, True, PRECISION)
    return m, den, acc


@triton.jit
def list_range(count, split, splits):
    """The part of a list of ``count`` entries that split number ``split`` takes."""
    size = (count + splits - 1) // splits
    first = tl.minimum(split * size, count)
    return first, tl.minimum(first + size, count)


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    out,
    lse,
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
    PARTIAL: tl.constexpr,
    CAUSAL: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BITS: tl.constexpr,
    LENGTHS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (work items * tiles per row block, splits): BM query rows over their list, or over one part of it.

    Strides are in elements; ``row_b`` and ``row_h`` count rows of the lists and are 0 where those are shared. ``lse``
    is (splits, B, H, q_len). ``sign`` is that of the scale: it goes into q, so that ``scale2`` is positive.
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

    blocks = (keys + BLOCK_K - 1) // BLOCK_K
    count = tl.load(kv_num + row)
    implicit = count == blocks
    idx = kv_idx + row * kv_width
    first, last = list_range(count, split, splits)
    # Lists ascend, so only the last entry can be the ragged block.
    final = list_entry(idx, tl.maximum(last - 1, 0), last, implicit)
    ragged = (first < last) & (final == blocks - 1) & (keys % BLOCK_K != 0)
    even = tl.where(ragged, last - 1, last)
    m, den, acc = walk_full(
        q_tile,
        m,
        den,
        acc,
        k_head,
        v_head,
        k_n,
        v_n,
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
    m, den, acc = walk_tail(q_tile, m, den, acc, k_head, v_head, k_n, v_n, start, keys, scale2, D, D_PAD, BN, PRECISION)
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
