"""Decoding over packed runs and exact keys on a GPU: split keys, all heads of a group in one tile, and the merge."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .triton_kernels import walk_exact, walk_runs


@triton.jit(do_not_specialize=["kv_heads", "group", "queries", "low", "exact", "splits"])
def decode_kernel(
    q_ptr,
    pk_ptr,
    pv_ptr,
    count_ptr,
    used_ptr,
    k_ptr,
    v_ptr,
    part_ptr,
    lse_ptr,
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
    kv_heads,
    group,
    queries,
    low,
    exact,
    splits,
    scale2,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (splits, B * Hkv): one block of few queries, all heads of a group in one tile of BM rows.

    Each split takes its part of the packed rows and of the exact rows low..exact. part (splits, B * Hkv, BM, D_PAD) and
    lse (splits, B * Hkv, BM) fp32, in base 2; a split without keys leaves 0 and -inf.
    """
    split, bkv = tl.program_id(0), tl.program_id(1)
    b, kv = (bkv // kv_heads).to(tl.int64), (bkv % kv_heads).to(tl.int64)
    i, d = tl.arange(0, BM), tl.arange(0, D_PAD)
    h, n = kv * group + i // queries, i % queries
    live = i < group * queries
    p_q = q_ptr + b * q_b + h[:, None] * q_h + n.to(tl.int64)[:, None] * q_n + d[None, :]
    q = tl.load(p_q, mask=live[:, None] & (d < D)[None, :], other=0.0)
    m = tl.full([BM], float("-inf"), tl.float32)
    den = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D_PAD], tl.float32)
    used = tl.load(used_ptr + bkv)
    step = (used + splits - 1) // splits
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
        tl.minimum(split * step, used),
        tl.minimum((split + 1) * step, used),
        scale2,
        D,
        D_PAD,
        BN,
        BP,
        PRECISION,
    )
    step = (exact - low + splits - 1) // splits
    start = tl.minimum(low + split * step, exact)
    stop = tl.minimum(start + step, exact)
    m, den, acc = walk_exact(
        q,
        m,
        den,
        acc,
        k_ptr + b * k_b + kv * k_h,
        v_ptr + b * v_b + kv * v_h,
        k_n,
        v_n,
        start,
        tl.minimum(exact - queries + 1, stop),
        stop,
        exact - queries + n,
        scale2,
        D,
        D_PAD,
        BN,
        BP,
        PRECISION,
    )
    empty = den == 0
    rows = (split * tl.num_programs(1) + bkv).to(tl.int64) * BM + i
    tl.store(part_ptr + rows[:, None] * D_PAD + d[None, :], acc / tl.where(empty, 1.0, den)[:, None])
    tl.store(lse_ptr + rows, tl.where(empty, float("-inf"), m + tl.log2(tl.where(empty, 1.0, den))))


@triton.jit(do_not_specialize=["kv_heads", "group", "queries", "splits", "items"])
def merge_kernel(
    part_ptr,
    lse_ptr,
    out_ptr,
    out_b,
    out_h,
    out_n,
    kv_heads,
    group,
    queries,
    splits,
    items,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BM: tl.constexpr,
):
    """Join the splits. Grid (B * Hkv * group * queries,): one output row a program."""
    pid = tl.program_id(0)
    rows = group * queries
    bkv, i = pid // rows, pid % rows
    b, kv = (bkv // kv_heads).to(tl.int64), bkv % kv_heads
    h, n = (kv * group + i // queries).to(tl.int64), (i % queries).to(tl.int64)
    d = tl.arange(0, D_PAD)
    m = tl.full([], float("-inf"), tl.float32)
    den = tl.zeros([], tl.float32)
    acc = tl.zeros([D_PAD], tl.float32)
    for split in range(splits):
        row = (split * items + bkv).to(tl.int64) * BM + i
        lse = tl.load(lse_ptr + row)
        value = tl.load(part_ptr + row * D_PAD + d)
        top = tl.maximum(m, lse)
        base = tl.where(top == float("-inf"), 0.0, top)
        old, new = tl.exp2(m - base), tl.exp2(lse - base)
        acc = acc * old + value * new
        den = den * old + new
        m = top
    out = acc / tl.where(den == 0, 1.0, den)
    tl.store(out_ptr + b * out_b + h * out_h + n * out_n + d, out.to(out_ptr.dtype.element_ty), mask=d < D)
