"""Attention over packed runs and exact keys on a GPU: two loops into one online softmax, and a split form to decode.

A program holds a tile of query rows. Its first loop walks the packed rows that its block may use, with a bias of log c
and no diagonal; its second the exact keys before the tile without a mask, then those at the diagonal with one. Both are
plain loops whose lengths are known before, so that loads run ahead. Few queries (decoding) instead put all heads of a
group into one tile, and cut the keys into parts that are merged by their log-sum-exps.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load(head, start, stride, stop, D: tl.constexpr, D_PAD: tl.constexpr, BN: tl.constexpr, RAGGED: tl.constexpr):
    """(BN, D_PAD) rows ``start``.. of a head; past ``stop`` (if RAGGED) and past D they are 0."""
    row, col = tl.arange(0, BN), tl.arange(0, D_PAD)
    # One 64-bit number a tile; offsets inside it are small. 64-bit offsets a row take the registers of a stage.
    at = head + tl.cast(start, tl.int64) * stride + (row[:, None] * stride + col[None, :])
    if RAGGED:
        inside = start + row < stop
        if D == D_PAD:
            return tl.load(at, mask=inside[:, None], other=0.0)
        return tl.load(at, mask=inside[:, None] & (col < D)[None, :], other=0.0)
    if D == D_PAD:
        return tl.load(at)
    return tl.load(at, mask=(col < D)[None, :], other=0.0)


@triton.jit
def _step(s, v, m, den, acc, PRECISION: tl.constexpr, MASKED: tl.constexpr):
    """One step of the online softmax; ``s`` (BM, BN) are logits in base 2."""
    top = tl.maximum(m, tl.max(s, 1))
    base = top
    if MASKED:
        base = tl.where(top == float("-inf"), 0.0, top)  # no key so far: never -inf - -inf
    p = tl.exp2(s - base[:, None])
    alpha = tl.exp2(m - base)
    den = den * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return top, den, acc


@triton.jit
def walk_runs(
    q,
    m,
    den,
    acc,
    k_head,
    v_head,
    counts,
    stride_k,
    stride_v,
    low,
    high,
    scale2,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BN: tl.constexpr,
    BP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Packed rows low..high, each of which holds a run."""
    whole = low + (high - low) // BN * BN
    for start in range(low, whole, BN):
        k = _load(k_head, start, stride_k, high, D, D_PAD, BN, False)
        v = _load(v_head, start, stride_v, high, D, D_PAD, BN, False)
        bias = tl.log2(tl.load(counts + start + tl.arange(0, BN)).to(tl.float32))
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2 + bias[None, :]
        m, den, acc = _step(s, v, m, den, acc, PRECISION, False)
    for start in tl.range(whole, high, BP, num_stages=1):
        row = start + tl.arange(0, BP)
        k = _load(k_head, start, stride_k, high, D, D_PAD, BP, True)
        v = _load(v_head, start, stride_v, high, D, D_PAD, BP, True)
        bias = tl.log2(tl.load(counts + row, mask=row < high, other=1).to(tl.float32))
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2 + bias[None, :]
        s = tl.where((row < high)[None, :], s, float("-inf"))
        m, den, acc = _step(s, v, m, den, acc, PRECISION, True)
    return m, den, acc


@triton.jit
def walk_exact(
    q,
    m,
    den,
    acc,
    k_head,
    v_head,
    stride_k,
    stride_v,
    low,
    free,
    high,
    last,
    scale2,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BN: tl.constexpr,
    BP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Exact rows low..high: those before ``free`` are seen by every query, from there on query i sees up to last[i]."""
    whole = low + tl.maximum(free - low, 0) // BN * BN
    for start in range(low, whole, BN):
        k = _load(k_head, start, stride_k, high, D, D_PAD, BN, False)
        v = _load(v_head, start, stride_v, high, D, D_PAD, BN, False)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
        m, den, acc = _step(s, v, m, den, acc, PRECISION, False)
    for start in tl.range(whole, high, BP, num_stages=1):
        row = start + tl.arange(0, BP)
        k = _load(k_head, start, stride_k, high, D, D_PAD, BP, True)
        v = _load(v_head, start, stride_v, high, D, D_PAD, BP, True)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
        s = tl.where((row < high)[None, :] & (row[None, :] <= last[:, None]), s, float("-inf"))
        m, den, acc = _step(s, v, m, den, acc, PRECISION, True)
    return m, den, acc


@triton.jit(do_not_specialize=["kv_heads", "group", "queries", "begin", "first"])
def prefill_kernel(
    q_ptr,
    pk_ptr,
    pv_ptr,
    count_ptr,
    used_ptr,
    k_ptr,
    v_ptr,
    from_ptr,
    out_ptr,
    q_b,
    q_h,
    q_n,
    pk_b,
    pk_h,
    pk_n,
    pv_b,
    pv_h,
    pv_n,
    c_b,
    c_h,
    k_b,
    k_h,
    k_n,
    v_b,
    v_h,
    v_n,
    out_b,
    out_h,
    out_n,
    used_s,
    kv_heads,
    group,
    queries,
    begin,
    first,
    scale2,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (blocks * CHUNK / BM, B * H). ``used`` is (blocks, B, Hkv), ``from`` (blocks,); ``begin`` is the position of
    the first exact row, ``first`` that of the first query.
    """
    TILES: tl.constexpr = CHUNK // BM
    # The last tiles have the longest lists: they begin first.
    item = tl.num_programs(0) - 1 - tl.program_id(0)
    block, tile = item // TILES, item % TILES
    heads = kv_heads * group
    bh = tl.program_id(1)
    b, h = (bh // heads).to(tl.int64), bh % heads
    kv = (h // group).to(tl.int64)
    at = (first // CHUNK + block) * CHUNK + tile * BM
    position = at + tl.arange(0, BM)
    live = (position >= first) & (position < first + queries)
    d = tl.arange(0, D_PAD)
    row = position - first
    p_q = q_ptr + b * q_b + h.to(tl.int64) * q_h + row.to(tl.int64)[:, None] * q_n + d[None, :]
    q = tl.load(p_q, mask=live[:, None] & (d < D)[None, :], other=0.0)
    m = tl.full([BM], float("-inf"), tl.float32)
    den = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D_PAD], tl.float32)
    used = tl.load(used_ptr + block * used_s + b * kv_heads + kv)
    m, den, acc = walk_runs(
        q,
        m,
        den,
        acc,
        pk_ptr + b * pk_b + kv * pk_h,
        pv_ptr + b * pv_b + kv * pv_h,
        count_ptr + b * c_b + kv * c_h,
        pk_n,
        pv_n,
        0,
        used,
        scale2,
        D,
        D_PAD,
        BN,
        BP,
        PRECISION,
    )
    low = tl.load(from_ptr + block) - begin
    stop = tl.minimum(at + BM, first + queries) - begin
    m, den, acc = walk_exact(
        q,
        m,
        den,
        acc,
        k_ptr + b * k_b + kv * k_h,
        v_ptr + b * v_b + kv * v_h,
        k_n,
        v_n,
        low,
        tl.maximum(at, first) - begin + 1,
        stop,
        position - begin,
        scale2,
        D,
        D_PAD,
        BN,
        BP,
        PRECISION,
    )
    out = acc / tl.where(den == 0, 1.0, den)[:, None]
    p_out = out_ptr + b * out_b + h.to(tl.int64) * out_h + row.to(tl.int64)[:, None] * out_n + d[None, :]
    tl.store(p_out, out.to(out_ptr.dtype.element_ty), mask=live[:, None] & (d < D)[None, :])
