"""Block mass on a GPU: one QK pass that keeps one number per block (AdaSpa, arXiv 2502.21079, search kernel).

A program takes a tile of query rows of one head, which may hold several blocks, so that they share the loads of the
keys, and walks over the keys. Each tile of logits is exponentiated and reduced to one number per block at once.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu import Variant, launching
from .reference import EXPONENT_LIMIT

LOG2E = tl.constexpr(1.4426950408889634)
LIMIT = tl.constexpr(EXPONENT_LIMIT * 1.4426950408889634)
SMALLEST_BLOCK = 16
# By bytes per number. fp32 operands are held three times over, as parts of TF32.
LARGEST_HEAD = {2: 256, 4: 64}
TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}


@triton.jit
def _tile(
    q,
    lse,
    k_ptr,
    start,
    keys,
    stride_kn,
    scale,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Masses [BM / BLOCK_Q, BN / BLOCK_K] and row sums [BM] of one tile; ``scale`` and ``lse`` are in base 2."""
    n = start + tl.arange(0, BN)
    d = tl.arange(0, D_PAD)
    p_k = k_ptr + n.to(tl.int64)[None, :] * stride_kn + d[:, None]  # [D_PAD, BN]
    if RAGGED:
        b_k = tl.load(p_k, mask=(n < keys)[None, :] & (d < D)[:, None], other=0.0)
    elif D < D_PAD:
        b_k = tl.load(p_k, mask=(d < D)[:, None], other=0.0)
    else:
        b_k = tl.load(p_k)
    s = tl.dot(q, b_k, input_precision=PRECISION) * scale - lse[:, None]
    # A NaN has to stay one: without propagation the limit would turn it into the largest mass there is.
    p = tl.exp2(tl.minimum(s, LIMIT, propagate_nan=tl.PropagateNan.ALL))
    if RAGGED:
        p = tl.where((n < keys)[None, :], p, 0.0)
    by_block = tl.sum(tl.reshape(p, [BM, BN // BLOCK_K, BLOCK_K]), 2)  # [BM, BN / BLOCK_K]
    # Rows without keys have LSE -inf; they count as 0 whatever their logits are.
    by_block = tl.where((lse == float("-inf"))[:, None], 0.0, by_block)
    mass = tl.sum(tl.reshape(by_block, [BM // BLOCK_Q, BLOCK_Q, BN // BLOCK_K]), 1)
    return mass, tl.sum(by_block, 1)


@triton.jit(do_not_specialize=["heads", "group", "q_len", "kv_len"])
def _block_mass_kernel(
    q_ptr,
    k_ptr,
    lse_ptr,
    lens_ptr,
    w_ptr,
    sum_ptr,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_lb,
    stride_lh,
    stride_ln,
    stride_wb,
    stride_wh,
    stride_wp,
    heads,
    group,
    q_len,
    kv_len,
    scale,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    HAS_LENS: tl.constexpr,
    ROW_SUM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """W (B, H, Nq, Nk) and, with ROW_SUM, r (B, H, q_len) contiguous. W of blocks past ``lens`` is 0 before."""
    tiles = tl.cdiv(q_len, BM)
    pid = tl.program_id(0)
    tile, bh = pid % tiles, pid // tiles  # neighbours share the keys of a head
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    i = tile * BM + tl.arange(0, BM)
    d = tl.arange(0, D_PAD)
    live = i < q_len
    p_q = q_ptr + b * stride_qb + h * stride_qh + i.to(tl.int64)[:, None] * stride_qn + d[None, :]
    b_q = tl.load(p_q, mask=live[:, None] & (d < D)[None, :], other=0.0)  # [BM, D_PAD]
    p_lse = lse_ptr + b * stride_lb + h * stride_lh + i.to(tl.int64) * stride_ln
    # Rows past the end get +inf: exp2(s - inf) is 0.
    lse = tl.load(p_lse, mask=live, other=float("inf")).to(tl.float32) * LOG2E
    if HAS_LENS:
        keys = tl.minimum(tl.maximum(tl.load(lens_ptr + b).to(tl.int32), 0), kv_len)
    else:
        keys = kv_len
    k_base = k_ptr + b * stride_kb + (h // group) * stride_kh
    row = tile * (BM // BLOCK_Q) + tl.arange(0, BM // BLOCK_Q)  # query blocks
    column = tl.arange(0, BN // BLOCK_K)  # key blocks
    p_w = w_ptr + b * stride_wb + h * stride_wh + row.to(tl.int64)[:, None] * stride_wp + column[None, :]
    here = (row < tl.cdiv(q_len, BLOCK_Q))[:, None]
    total = tl.zeros([BM], dtype=tl.float32)
    whole = keys // BN * BN
    for start in range(0, whole, BN):
        mass, rows = _tile(
            b_q, lse, k_base, start, keys, stride_kn, scale, D, D_PAD, BLOCK_Q, BLOCK_K, BM, BN, False, PRECISION
        )
        tl.store(p_w + start // BLOCK_K, mass, mask=here)
        total += rows
    if whole < keys:
        mass, rows = _tile(
            b_q, lse, k_base, whole, keys, stride_kn, scale, D, D_PAD, BLOCK_Q, BLOCK_K, BM, BN, True, PRECISION
        )
        inside = (whole // BLOCK_K + column < tl.cdiv(keys, BLOCK_K))[None, :]
        tl.store(p_w + whole // BLOCK_K, mass, mask=here & inside)
        total += rows
    if ROW_SUM:
        tl.store(sum_ptr + bh.to(tl.int64) * q_len + i, total, mask=live)


class Tile(NamedTuple):
    """Launch parameters: query rows and keys per tile, warps, pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int


def tile_of(d: int, bytes_per: int) -> Tile:
    """The tile for head size ``d`` (a power of two); small enough for every GPU. From the compile gate, not timed."""
    if bytes_per == 4:
        return Tile(64, 32, 8, 2)
    return Tile(128, 64, 8, 3) if d <= 128 else Tile(64, 64, 8, 2)


def unsupported(q: Tensor, block_q: int, block_k: int) -> str | None:
    """What this kernel cannot do of a call, or None."""
    for n in (block_q, block_k):
        if n < SMALLEST_BLOCK or n & (n - 1):
            return f"blocks {block_q} x {block_k} are not powers of two from {SMALLEST_BLOCK}"
    if q.dtype not in TYPES:
        return f"no kernel for {q.dtype}"
    if q.shape[-1] > LARGEST_HEAD[q.element_size()]:
        return f"head size {q.shape[-1]} in {q.dtype} needs more registers than there are"
    return None


def block_mass_triton(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    block_q: int,
    block_k: int,
    kv_lens: Tensor | None,
    row_sum: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See :func:`patchkit.kernels.block_mass`; the row sums are an empty tensor unless ``row_sum``.

    Blocks larger than a tile are computed in parts of a tile, and these are added up.
    """
    B, H, q_len, D = q.shape
    kv_len = k.shape[2]
    padded = max(16, triton.next_power_of_2(D))
    tile = tile_of(padded, q.element_size())
    part_q, part_k = min(block_q, tile.rows), min(block_k, tile.keys)
    n_q, n_k = -(-q_len // part_q), -(-kv_len // part_k)
    # The kernel writes the blocks of real keys only.
    new = q.new_empty if kv_lens is None else q.new_zeros
    W = new((B, H, n_q, n_k), dtype=torch.float32)
    sums = q.new_empty((B, H, q_len) if row_sum else (0,), dtype=torch.float32)
    if B * H * q_len:
        with launching(q.device):
            _block_mass_kernel[(-(-q_len // tile.rows) * B * H,)](
                q,
                k,
                lse,
                kv_lens,
                W,
                sums if row_sum else None,
                *q.stride()[:3],
                *k.stride()[:3],
                *lse.stride(),
                *W.stride()[:3],
                H,
                H // k.shape[1],
                q_len,
                kv_len,
                scale * LOG2E.value,
                D=D,
                D_PAD=padded,
                BLOCK_Q=part_q,
                BLOCK_K=part_k,
                BM=tile.rows,
                BN=tile.keys,
                HAS_LENS=kv_lens is not None,
                ROW_SUM=row_sum,
                PRECISION=_precision(q),
                num_warps=tile.warps,
                num_stages=tile.stages,
            )
    return _join(W, block_q // part_q, block_k // part_k), sums


def _join(W: Tensor, rows: int, columns: int) -> Tensor:
    """Add up ``rows`` x ``columns`` parts to one block."""
    if rows == columns == 1:
        return W
    W = torch.nn.functional.pad(W, (0, -W.shape[3] % columns, 0, -W.shape[2] % rows))
    return W.unflatten(3, (-1, columns)).unflatten(2, (-1, rows)).sum((3, 5))


def _precision(x: Tensor) -> str:
    """How fp32 operands are multiplied: three TF32 products on NVIDIA; AMD and the interpreter have plain fp32."""
    return "tf32x3" if x.device.type == "cuda" and torch.version.hip is None else "ieee"


def variants() -> list[Variant]:
    """Every form of launch for the shapes that matter."""
    forms = [
        (64, torch.bfloat16, 64, 64, False, False),
        (64, torch.float16, 128, 128, True, True),
        (64, torch.float16, 32, 16, True, False),
        (128, torch.bfloat16, 64, 64, False, True),
        (128, torch.float16, 64, 64, True, True),
        (128, torch.bfloat16, 128, 64, False, False),
        (128, torch.bfloat16, 64, 32, True, False),
        (80, torch.bfloat16, 64, 64, True, True),
        (256, torch.bfloat16, 64, 64, False, True),
        (64, torch.float32, 64, 64, True, True),
    ]
    return [_variant(*form) for form in forms]


def _variant(D: int, dtype: torch.dtype, block_q: int, block_k: int, lens: bool, row_sum: bool) -> Variant:
    padded = triton.next_power_of_2(D)
    tile = tile_of(padded, dtype.itemsize)
    integers = [n for n in _block_mass_kernel.arg_names if n.startswith("stride_")]
    types = dict.fromkeys([*integers, "heads", "group", "q_len", "kv_len"], "i32")
    types |= {"q_ptr": TYPES[dtype], "k_ptr": TYPES[dtype], "lse_ptr": "*fp32", "w_ptr": "*fp32", "scale": "fp32"}
    types |= {"lens_ptr": "*i32"} if lens else {}
    types |= {"sum_ptr": "*fp32"} if row_sum else {}
    constants = {
        "D": D,
        "D_PAD": padded,
        "BLOCK_Q": min(block_q, tile.rows),
        "BLOCK_K": min(block_k, tile.keys),
        "BM": tile.rows,
        "BN": tile.keys,
        "HAS_LENS": lens,
        "ROW_SUM": row_sum,
        "PRECISION": "tf32x3",
        "stride_ln": 1,
    }
    constants |= {} if lens else {"lens_ptr": None}
    constants |= {} if row_sum else {"sum_ptr": None}
    types = {name: kind for name, kind in types.items() if name not in constants}
    flags = " ".join(name for name, on in (("lens", lens), ("sums", row_sum)) if on)
    name = f"mass D{D} {TYPES[dtype][1:]} {block_q}x{block_k} {flags}".strip()
    sizes = {"heads", "group", "q_len", "kv_len"}
    loose = frozenset(sizes | {n for n in integers if n.startswith(("stride_w", "stride_l"))})
    return Variant(name, _block_mass_kernel, types, constants, tile.warps, tile.stages, loose=loose)
