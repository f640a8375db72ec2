"""Quantised attention on a GPU: online softmax over a list of key blocks, products in 8 bits.

One program attends one tile of query rows of one head to the blocks of its list. Whole blocks run without a mask; the
ragged last one follows. Integer products go to int32 and are widened block by block, because each has its own scale.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from ...reorder.triton import place_of
from ...sparse.triton.shared import list_entry
from ..formats import FLOOR

LEAST = tl.constexpr(FLOOR)


@triton.jit
def _weighted(p, v, live, top, BM: tl.constexpr, BN: tl.constexpr, PV: tl.constexpr, ROWS: tl.constexpr):
    """(BM, D) product of probabilities (BM, BN) and values, in the values' own units. PV: 1 integers, 2 fp8."""
    if PV == 2:
        # a fresh accumulator: Hopper's fp8 products keep 14 bits of a long sum
        made = tl.dot((p * 448.0).to(tl.float8e4nv), v) * (1.0 / 448.0)
    else:
        p = tl.where(live[:, None], p, 0.0)  # rows past the end must not set the scale of a block
        most = tl.max(p, 1)
        if ROWS > 0:
            by_block = tl.max(tl.reshape(most, [BM // ROWS, ROWS]), 1)
            most = tl.reshape(tl.broadcast_to(by_block[:, None], [BM // ROWS, ROWS]), [BM])
        step = tl.maximum(most, LEAST) / top
        whole = tl.minimum(tl.floor(p / step[:, None] + 0.5), top).to(tl.int8)
        made = tl.dot(whole, v, out_dtype=tl.int32).to(tl.float32) * step[:, None]
    return made


@triton.jit
def _step(
    q,
    q_scale,
    k_head,
    k_scale,
    v_head,
    k_n,
    v_n,
    v_d,
    start,
    keys,
    live,
    m,
    den,
    acc,
    scale2,
    top,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    QK: tl.constexpr,
    PV: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step over BN keys from ``start`` on; with MASKED only those before ``keys`` count."""
    n, col = start + tl.arange(0, BN), tl.arange(0, D_PAD)
    at = n.to(tl.int64)
    if QK:
        k = tl.load(k_head + at[None, :] * k_n + col[:, None])  # padded with zeros: no mask
        s = tl.dot(q, k, out_dtype=tl.int32).to(tl.float32) * q_scale[:, None] * tl.load(k_scale + start // BN)
    else:
        inside = (col < D)[:, None]
        if MASKED:
            inside = inside & (n < keys)[None, :]
        k = tl.load(k_head + at[None, :] * k_n + col[:, None], mask=inside, other=0.0)
        s = tl.dot(q, k, input_precision=PRECISION) * scale2
    if MASKED:
        s = tl.where((n < keys)[None, :], s, float("-inf"))
    best = tl.maximum(m, tl.max(s, 1))  # finite: a step has at least one key
    p, alpha = tl.exp2(s - best[:, None]), tl.exp2(m - best)
    den = den * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None]
    if PV:
        v = tl.load(v_head + at[:, None] + col[None, :].to(tl.int64) * v_d)  # transposed and padded: no mask
        acc += _weighted(p, v, live, top, BM, BN, PV, ROWS)
    else:
        whole = (col < D)[None, :]
        if MASKED:
            whole = whole & (n < keys)[:, None]
        v = tl.load(v_head + at[:, None] * v_n + col[None, :], mask=whole, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return best, den, acc


@triton.jit
def attend_kernel(
    q,
    q_scale,
    k,
    k_scale,
    v,
    v_scale,
    v_mean,
    shift,
    out,
    lse,
    kv_idx,
    kv_num,
    kv_lens,
    order,
    table,
    q_b,
    q_h,
    q_n,
    k_b,
    k_h,
    k_n,
    v_b,
    v_h,
    v_n,
    v_d,
    out_b,
    out_h,
    out_n,
    row_b,
    row_h,
    kv_width,
    q_groups,
    k_groups,
    heads,
    k_group,
    v_group,
    mean_group,
    n_q,
    q_len,
    kv_len,
    start,
    stop,
    scale2,
    top,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    Q_GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    QK: tl.constexpr,
    PV: tl.constexpr,
    SMOOTH_V: tl.constexpr,
    SHIFT: tl.constexpr,
    LENGTHS: tl.constexpr,
    REORDER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (work items * tiles of a row block): BM query rows over their list.

    ``k_group``, ``v_group`` and ``mean_group`` are query heads on one head of the keys, of the values as loaded, and of
    their scales and means. Outputs go to where their tokens stand in the model's order.
    """
    TILES: tl.constexpr = BLOCK_Q // BM
    SUB: tl.constexpr = BLOCK_K // BN
    item = tl.load(order + tl.program_id(0) // TILES)
    p, head = item % n_q, item // n_q
    h, b = (head % heads).to(tl.int64), (head // heads).to(tl.int64)
    row = b * row_b + h * row_h + p
    keys = kv_len
    if LENGTHS:
        keys = tl.load(kv_lens + b).to(tl.int32)
    n, col = p * BLOCK_Q + (tl.program_id(0) % TILES) * BM + tl.arange(0, BM), tl.arange(0, D_PAD)
    live, channel = n < q_len, col < D
    q_tile = tl.load(
        q + b * q_b + h * q_h + n.to(tl.int64)[:, None] * q_n + col[None, :],
        mask=live[:, None] & (channel | (QK != 0))[None, :],
        other=0,
    )
    steps = tl.full([BM], 1.0, tl.float32)
    if QK:
        steps = tl.load(q_scale + (b * heads + h) * q_groups + n // Q_GROUP, mask=live, other=0.0)
    k_head, v_head = k + b * k_b + (h // k_group) * k_h, v + b * v_b + (h // v_group) * v_h
    k_steps = k_head  # not read
    if QK:
        k_steps = k_scale + (b * (heads // k_group) + h // k_group) * k_groups

    m = tl.full([BM], float("-inf"), tl.float32)
    den = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D_PAD], tl.float32)
    blocks = (keys + BLOCK_K - 1) // BLOCK_K
    count = tl.load(kv_num + row)
    implicit = count == blocks
    idx = kv_idx + row * kv_width
    final = list_entry(idx, tl.maximum(count - 1, 0), count, implicit)
    ragged = (count > 0) & (final == blocks - 1) & (keys % BLOCK_K != 0)
    even = tl.where(ragged, count - 1, count)
    block = list_entry(idx, 0, count, implicit)
    for t in range(even * SUB):
        at = block * BLOCK_K + (t % SUB) * BN
        block = list_entry(idx, (t + 1) // SUB, count, implicit)  # a step ahead, or every load waits for its index
        m, den, acc = _step(
            *(q_tile, steps, k_head, k_steps, v_head, k_n, v_n, v_d, at, keys, live, m, den, acc, scale2, top),
            *(D, D_PAD, BM, BN, QK, PV, ROWS, False, PRECISION),
        )
    tail = tl.where(ragged, (blocks - 1) * BLOCK_K, keys)
    for t in tl.range(0, (keys - tail + BN - 1) // BN, num_stages=1):
        m, den, acc = _step(
            *(q_tile, steps, k_head, k_steps, v_head, k_n, v_n, v_d, tail + t * BN, keys, live, m, den, acc, scale2),
            *(top, D, D_PAD, BM, BN, QK, PV, ROWS, True, PRECISION),
        )

    empty = den == 0.0
    acc = acc / tl.where(empty, 1.0, den)[:, None]
    if PV:
        at = (b * (heads // mean_group) + h // mean_group) * D + col
        acc = acc * tl.load(v_scale + at, mask=channel, other=0.0)[None, :]
        if SMOOTH_V:
            acc = tl.where(empty[:, None], 0.0, acc + tl.load(v_mean + at, mask=channel, other=0.0)[None, :])
    found = (m + tl.log2(tl.where(empty, 1.0, den))) * 0.6931471805599453
    if SHIFT:
        found += tl.load(shift + (b * heads + h) * q_len + n, mask=live, other=0.0)
    place = n
    if REORDER:
        place = place_of(n, table, h, start, stop)
    to = out + b * out_b + h * out_h + place.to(tl.int64)[:, None] * out_n + col[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=live[:, None] & channel[None, :])
    tl.store(lse + (b * heads + h) * q_len + place, tl.where(empty, float("-inf"), found), mask=live)
