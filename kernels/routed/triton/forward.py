"""The kernel: a program takes BM active rows of one KV head, whatever query heads of its group they are of.

Rows come sorted by token, so that a tile's keys end just behind its first row's, and one tile of keys and values serves
the whole group. Keys that all rows of the tile see are walked without a mask, in a loop of known length, so that loads
run ahead; those at the diagonal, and all keys under a mask that is more than padding, come in a second loop.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from ...sparse.triton.steps import load_tile, tile_step

NO_MASK, BY_KEY, BY_PAIR = 0, 1, 2
KEYS, PAIRS = tl.constexpr(BY_KEY), tl.constexpr(BY_PAIR)
UNSPECIALISED = ["width", "kv_heads", "samples", "group", "queries", "keys"]


@triton.jit
def masked_steps(
    q,
    m,
    den,
    acc,
    k_head,
    v_head,
    k_n,
    v_n,
    mask_row,
    mask_m,
    low,
    stop,
    last,
    scale2,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BN: tl.constexpr,
    MASK: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Keys low..stop, of which row i sees those before last[i] that the mask shows.

    ``mask_row`` points at key 0 of the sample's mask, or (BM,) at key 0 of each row's.
    """
    for t in tl.range(0, (stop - low + BN - 1) // BN, num_stages=STAGES):
        start = low + t * BN
        n = start + tl.arange(0, BN)
        inside = n < stop
        ok = n[None, :] < last[:, None]
        if MASK == KEYS:
            seen = tl.load(mask_row + n.to(tl.int64) * mask_m, mask=inside, other=0) != 0
            ok = ok & seen[None, :]
        if MASK == PAIRS:
            at = mask_row[:, None] + n.to(tl.int64)[None, :] * mask_m
            ok = ok & (tl.load(at, mask=ok, other=0) != 0)
        k = load_tile(k_head, start, k_n, inside, D, D_PAD, BN, True)
        v = load_tile(v_head, start, v_n, inside, D, D_PAD, BN, True)
        if MASK != 0:
            # What no row sees counts as not there, whatever stands in it: 0 * NaN is NaN.
            v = tl.where((tl.max(ok.to(tl.int32), 0) > 0)[:, None], v, 0.0).to(v.dtype)
        m, den, acc = tile_step(q, k, v, ok, m, den, acc, scale2, True, PRECISION)
    return m, den, acc


@triton.jit(do_not_specialize=UNSPECIALISED)
def routed_kernel(
    q,
    k,
    v,
    out,
    rows,
    counts,
    gates,
    mask,
    bounds,
    q_b,
    q_h,
    q_n,
    k_b,
    k_h,
    k_n,
    v_b,
    v_h,
    v_n,
    out_b,
    out_h,
    out_n,
    gate_b,
    gate_h,
    gate_n,
    mask_b,
    mask_n,
    mask_m,
    width,
    kv_heads,
    samples,
    group,
    queries,
    keys,
    sign,
    scale2,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BP: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    GATES: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (tiles of a KV head at most * B * G,), the tiles with the last rows, and so the most keys, first.

    ``rows`` (B * G, width) int32 lists token * group + head of the active rows, ``counts`` (B * G,) how many they are;
    ``bounds`` (B, 3) int32: first key that the mask shows, behind the last, and whether it hides any between.
    """
    pid = tl.program_id(0)
    heads = kv_heads * samples
    bg = pid % heads
    count = tl.load(counts + bg)
    tile = (count + BM - 1) // BM - 1 - pid // heads
    if tile < 0:
        return
    b, j = (bg // kv_heads).to(tl.int64), (bg % kv_heads).to(tl.int64)
    i = tile * BM + tl.arange(0, BM)
    live = i < count
    row = tl.load(rows + bg.to(tl.int64) * width + i, mask=live, other=0)
    token = row // group
    h, t = j * group + row % group, token.to(tl.int64)
    col = tl.arange(0, D_PAD)
    inside = live[:, None] & (col < D)[None, :]
    q_tile = tl.load(q + b * q_b + (h * q_h + t * q_n)[:, None] + col[None, :], mask=inside, other=0.0)
    q_tile = (q_tile * sign).to(q.dtype.element_ty)
    k_head, v_head = k + b * k_b + j * k_h, v + b * v_b + j * v_h

    low, high, holes = tl.full([], 0, tl.int32), keys, 0
    mask_row = mask
    if MASK == KEYS:
        low, high, holes = tl.load(bounds + b * 3), tl.load(bounds + b * 3 + 1), tl.load(bounds + b * 3 + 2)
        mask_row = mask + b * mask_b
    if MASK == PAIRS:
        holes = 1
        mask_row = mask + b * mask_b + t * mask_n
    last = tl.zeros([BM], tl.int32) + high
    if CAUSAL:
        last = tl.minimum(token + (keys - queries + 1), high)
    stop = tl.max(tl.where(live, last, 0), 0)
    free = tl.maximum(tl.min(tl.where(live, last, high), 0) - low, 0) // BN
    free = tl.where(holes != 0, 0, free)

    m = tl.full([BM], float("-inf"), tl.float32)
    den = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D_PAD], tl.float32)
    for step in range(free):
        start = low + step * BN
        k_tile = load_tile(k_head, start, k_n, None, D, D_PAD, BN, False)
        v_tile = load_tile(v_head, start, v_n, None, D, D_PAD, BN, False)
        m, den, acc = tile_step(q_tile, k_tile, v_tile, None, m, den, acc, scale2, False, PRECISION)
    m, den, acc = masked_steps(
        q_tile,
        m,
        den,
        acc,
        k_head,
        v_head,
        k_n,
        v_n,
        mask_row,
        mask_m,
        low + free * BN,
        stop,
        last,
        scale2,
        D,
        D_PAD,
        BP,
        MASK,
        STAGES,
        PRECISION,
    )
    # Read again: until here it would only have taken registers.
    row = tl.load(rows + bg.to(tl.int64) * width + i, mask=live, other=0, cache_modifier=".cg")
    h, t = j * group + row % group, (row // group).to(tl.int64)
    factor = 1.0 / tl.where(den == 0.0, 1.0, den)  # acc is 0 where no key was seen
    if GATES:
        gate = tl.load(gates + b * gate_b + h * gate_h + t * gate_n, mask=live, other=0.0)
        factor = factor * gate.to(tl.float32)
    to = out + b * out_b + (h * out_h + t * out_n)[:, None] + col[None, :]
    tl.store(to, (acc * factor[:, None]).to(out.dtype.element_ty), mask=inside)
