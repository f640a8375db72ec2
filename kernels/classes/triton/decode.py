"""One query a head against a long cache, with the keys' classes apart (flash decoding, one byte a key more).

The queries of a KV head and the classes share the rows of one tile: row r holds query head r // C and class r % C. A
row's weights are those of its query, zero where a key is of another class. So the keys and values are read once, and
the products are those of ordinary decoding; as every row of a query sees the same logits, their maximum is common.
Keys are cut into splits. The second kernel joins them, and edits: see :mod:`patchkit.kernels.redistribute`.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

HIDDEN = tl.constexpr(255)


@triton.jit
def _step(
    acc,
    sums,
    top,
    b_q,
    k_ptr,
    v_ptr,
    class_ptr,
    start,
    stop,
    stride_kn,
    stride_vn,
    mine,
    scale2,
    cap,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BN: tl.constexpr,
    SOFTCAP: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds BN keys to [ROWS, D_PAD] values, [ROWS] sums and [ROWS] maxima (base 2)."""
    n = start + tl.arange(0, BN)
    d = tl.arange(0, D_PAD)
    far = n.to(tl.int64)
    p_k = k_ptr + far[None, :] * stride_kn + d[:, None]  # [D_PAD, BN]
    p_v = v_ptr + far[:, None] * stride_vn + d[None, :]  # [BN, D_PAD]
    live = n < stop
    if RAGGED:
        b_k = tl.load(p_k, mask=live[None, :] & (d < D)[:, None], other=0.0)
        kind = tl.load(class_ptr + n, mask=live, other=255).to(tl.int32)
    elif D < D_PAD:
        b_k = tl.load(p_k, mask=(d < D)[:, None], other=0.0)
        kind = tl.load(class_ptr + n).to(tl.int32)
    else:
        b_k = tl.load(p_k)
        kind = tl.load(class_ptr + n).to(tl.int32)
    s = tl.dot(b_q, b_k, input_precision=PRECISION)
    if SOFTCAP:
        # tanh by exp2: 1 - 2 / (1 + exp(2 x)); scale2 is scale / cap, and cap is the cap in base 2
        s = cap * (1.0 - 2.0 / (1.0 + tl.exp2(s * (2.0 * scale2 * 1.4426950408889634))))
    else:
        s = s * scale2
    s = tl.where((kind == HIDDEN)[None, :], float("-inf"), s)
    higher = tl.maximum(top, tl.max(s, 1))
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.where(kind[None, :] == mine[:, None], tl.exp2(s - safe[:, None]), 0.0)
    shrink = tl.exp2(top - safe)
    if RAGGED:
        b_v = tl.load(p_v, mask=live[:, None] & (d < D)[None, :], other=0.0)
    elif D < D_PAD:
        b_v = tl.load(p_v, mask=(d < D)[None, :], other=0.0)
    else:
        b_v = tl.load(p_v)
    acc = acc * shrink[:, None] + tl.dot(p.to(b_v.dtype), b_v, input_precision=PRECISION)
    return acc, sums * shrink + tl.sum(p, 1), higher


@triton.jit(do_not_specialize=["kv_heads", "keys", "length", "splits"])
def split_kernel(
    q,
    k,
    v,
    classes,
    top,
    sums,
    values,
    stride_qb,
    stride_qh,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_cb,
    kv_heads,
    keys,
    length,
    splits,
    scale2,
    cap,
    GROUP: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BN: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Parts of split s of KV head h of sample b: top, sums (B, Hkv, splits, ROWS), values (..., ROWS, D_PAD), fp32."""
    pid = tl.program_id(0)
    split, bh = pid % splits, pid // splits
    b, h = (bh // kv_heads).to(tl.int64), (bh % kv_heads).to(tl.int64)
    r = tl.arange(0, ROWS)
    d = tl.arange(0, D_PAD)
    head = r // C
    p_q = q + b * stride_qb + (h * GROUP + head)[:, None] * stride_qh + d[None, :]
    b_q = tl.load(p_q, mask=(head < GROUP)[:, None] & (d < D)[None, :], other=0.0)  # [ROWS, D_PAD]
    k_base = k + b * stride_kb + h * stride_kh
    v_base = v + b * stride_vb + h * stride_vh
    c_base = classes + b * stride_cb
    acc = tl.zeros([ROWS, D_PAD], dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    high = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    begin = split * length
    end = tl.minimum(begin + length, keys)
    whole = begin + (end - begin) // BN * BN
    for start in range(begin, whole, BN):
        acc, total, high = _step(
            acc,
            total,
            high,
            b_q,
            k_base,
            v_base,
            c_base,
            start,
            end,
            stride_kn,
            stride_vn,
            r % C,
            scale2,
            cap,
            D,
            D_PAD,
            BN,
            SOFTCAP,
            False,
            PRECISION,
        )
    if whole < end:
        acc, total, high = _step(
            acc,
            total,
            high,
            b_q,
            k_base,
            v_base,
            c_base,
            whole,
            end,
            stride_kn,
            stride_vn,
            r % C,
            scale2,
            cap,
            D,
            D_PAD,
            BN,
            SOFTCAP,
            True,
            PRECISION,
        )
    place = pid.to(tl.int64) * ROWS + r
    tl.store(top + place, high)
    tl.store(sums + place, total)
    tl.store(values + place[:, None] * D_PAD + d[None, :], acc)


@triton.jit
def joined(top, sums, values, first, row, splits, ROWS: tl.constexpr, S_PAD: tl.constexpr, D_PAD: tl.constexpr):
    """One row of all splits, joined: its maximum (base 2), sum and values [D_PAD]. ``first``: number of split 0."""
    i = tl.arange(0, S_PAD)
    d = tl.arange(0, D_PAD)
    live = i < splits
    place = (first + i) * ROWS + row
    tops = tl.load(top + place, mask=live, other=float("-inf"))
    high = tl.max(tops, 0)
    weight = tl.exp2(tops - tl.where(high == float("-inf"), 0.0, high))  # [S_PAD]
    total = tl.sum(weight * tl.load(sums + place, mask=live, other=0.0), 0)
    part = tl.load(values + place[:, None] * D_PAD + d[None, :], mask=live[:, None], other=0.0)
    return high, total, tl.sum(weight[:, None] * part, 0)


@triton.jit(do_not_specialize=["heads", "group", "splits"])
def join_kernel(
    top,
    sums,
    values,
    out_top,
    out_sums,
    out,
    heads,
    group,
    splits,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    S_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
):
    """Class c of query head h of sample b: top (B, H) natural, sums (B, H, C), values (B, H, C, D), fp32."""
    bh, c = tl.program_id(0), tl.program_id(1)
    kv = (bh // group).to(tl.int64)  # heads are a multiple of group, so this counts KV heads over the batch
    high, total, value = joined(top, sums, values, kv * splits, (bh % group) * C + c, splits, ROWS, S_PAD, D_PAD)
    d = tl.arange(0, D_PAD)
    tl.store(out_top + bh, tl.where(high == float("-inf"), 0.0, high * 0.6931471805599453))
    tl.store(out_sums + bh * C + c, total)
    tl.store(out + (bh.to(tl.int64) * C + c) * D + d, value, mask=d < D)
