"""Finding and packing runs on a GPU: a program walks along one chunk of one head, its anchor in registers."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu import Variant, launching
from .blocked import TINY

LARGEST_HEAD = 1024
PART = 128  # tokens that one program packs; programs begin wherever this falls, and look back for their run's begin
MEASURES = {"max": 0, "euclidean": 1, "cosine": 2}
TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
LEAST = tl.constexpr(TINY)


@triton.jit(do_not_specialize=["heads", "tokens", "chunks", "chunk", "single", "first"])
def _find_kernel(
    k_ptr,
    theta_ptr,
    out_ptr,
    stride_kb,
    stride_kh,
    stride_kn,
    heads,
    tokens,
    chunks,
    chunk,
    single,
    first,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    MEASURE: tl.constexpr,
):
    """out (B, H, N) bool, contiguous; theta (B, H). Grid (chunks * B * H,)."""
    pid = tl.program_id(0)
    begin, bh = (pid % chunks) * chunk, (pid // chunks).to(tl.int64)
    b, h = bh // heads, bh % heads
    d = tl.arange(0, D_PAD)
    live = d < D
    theta = tl.load(theta_ptr + bh)
    p_k = k_ptr + b * stride_kb + h * stride_kh + begin.to(tl.int64) * stride_kn + d
    p_out = out_ptr + bh * tokens + begin
    anchor = tl.load(p_k, mask=live, other=0.0).to(tl.float32)
    length = tl.maximum(tl.sum(anchor * anchor, 0), LEAST)
    tl.store(p_out, (begin >= 0).to(tl.int1))
    for t in range(1, tl.minimum(chunk, tokens - begin)):
        p_k += stride_kn
        row = tl.load(p_k, mask=live, other=0.0).to(tl.float32)
        if MEASURE == 0:
            far = tl.max(tl.abs(row - anchor), 0) > theta
        elif MEASURE == 1:
            away = row - anchor
            far = tl.sum(away * away, 0) > theta * theta
        else:
            norm = tl.maximum(tl.sum(row * row, 0), LEAST)
            far = tl.sum(row * anchor, 0) < theta * tl.sqrt(norm * length)
        far = far | (first + begin + t <= single)
        tl.store(p_out + t, far)
        anchor = tl.where(far, row, anchor)
        if MEASURE == 2:
            length = tl.where(far, norm, length)


@triton.jit(do_not_specialize=["heads", "tokens", "parts", "rows"])
def _pack_kernel(
    k_ptr,
    v_ptr,
    begins_ptr,
    upto_ptr,
    keys_ptr,
    values_ptr,
    counts_ptr,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    heads,
    tokens,
    parts,
    rows,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    LENGTH: tl.constexpr,
    MEAN: tl.constexpr,
):
    """keys (B, H, M, D), values (B, H, M, DV), counts (B, H, M), contiguous, zero before. Grid (parts * B * H,).

    A program packs the runs that begin in its LENGTH tokens, to their end, which may lie behind them. ``upto``
    (B, H, N) int32 counts the runs that begin up to each token.
    """
    pid = tl.program_id(0)
    at, bh = (pid % parts) * LENGTH, (pid // parts).to(tl.int64)
    b, h = bh // heads, bh % heads
    d, dv = tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
    k_head = k_ptr + b * stride_kb + h * stride_kh + d
    v_head = v_ptr + b * stride_vb + h * stride_vh + dv
    begins = begins_ptr + bh * tokens
    upto = upto_ptr + bh * tokens
    stop = tl.minimum(at + LENGTH, tokens)
    key = tl.zeros([D_PAD], dtype=tl.float32)
    value = tl.zeros([DV_PAD], dtype=tl.float32)
    count = 0
    row = (bh * rows).to(tl.int64)
    n = at
    going = n < tokens
    while going:
        fresh = tl.load(begins + n) != 0
        if fresh & (count > 0):
            _store_run(keys_ptr, values_ptr, counts_ptr, row, key, value, count, d, dv, D, DV, MEAN)
            count = 0
        if fresh:
            going = n < stop
            row = bh * rows + tl.load(upto + n).to(tl.int64) - 1
        if going & (fresh | (count > 0)):
            k = tl.load(k_head + n.to(tl.int64) * stride_kn, mask=d < D, other=0.0).to(tl.float32)
            v = tl.load(v_head + n.to(tl.int64) * stride_vn, mask=dv < DV, other=0.0).to(tl.float32)
            value = tl.where(fresh, v, value + v)
            if MEAN:
                key = tl.where(fresh, k, key + k)
            else:
                key = tl.where(fresh, k, key)
            count += 1
        n += 1
        # Past its own tokens a program goes on only for a run that has begun.
        going = going & (n < tokens) & ((n < stop) | (count > 0))
    if count > 0:
        _store_run(keys_ptr, values_ptr, counts_ptr, row, key, value, count, d, dv, D, DV, MEAN)


@triton.jit
def _store_run(
    keys_ptr,
    values_ptr,
    counts_ptr,
    row,
    key,
    value,
    count,
    d,
    dv,
    D: tl.constexpr,
    DV: tl.constexpr,
    MEAN: tl.constexpr,
):
    if MEAN:
        key = key / count
    tl.store(keys_ptr + row * D + d, key.to(keys_ptr.dtype.element_ty), mask=d < D)
    tl.store(values_ptr + row * DV + dv, (value / count).to(values_ptr.dtype.element_ty), mask=dv < DV)
    tl.store(counts_ptr + row, count)


def unsupported(x: Tensor) -> str | None:
    """What these kernels cannot do of a call, or None."""
    if x.dtype not in TYPES:
        return f"no kernel for {x.dtype}"
    if x.shape[-1] > LARGEST_HEAD:
        return f"head size {x.shape[-1]} is larger than {LARGEST_HEAD}"
    return "the last dimension is strided" if x.stride(-1) != 1 else None


def warps_of(block: int) -> int:
    """A token's elements side by side: one warp up to 128 of them."""
    return max(1, block // 128)


def find_runs_triton(k: Tensor, theta: Tensor, metric: str, chunk: int, single: int, first: int) -> Tensor:
    """See :func:`patchkit.kernels.find_runs`; ``theta`` (B, Hkv) fp32 contiguous."""
    B, H, N, D = k.shape
    out = torch.empty(B, H, N, dtype=torch.bool, device=k.device)
    chunks = -(-N // chunk)
    block = triton.next_power_of_2(D)
    with launching(k.device):
        _find_kernel[(chunks * B * H,)](
            k,
            theta,
            out,
            *k.stride()[:3],
            H,
            N,
            chunks,
            chunk,
            single,
            first,
            D=D,
            D_PAD=block,
            MEASURE=MEASURES[metric],
            num_warps=warps_of(block),
            num_stages=1,
        )
    return out


def pack_runs_triton(k: Tensor, v: Tensor, begins: Tensor, mean_keys: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`patchkit.kernels.pack_runs`."""
    B, H, N, D = k.shape
    upto = begins.cumsum(-1, dtype=torch.int32)
    rows = int(upto[..., -1].max())
    keys, values = (torch.zeros(B, H, rows, x.shape[-1], dtype=x.dtype, device=x.device) for x in (k, v))
    counts = torch.zeros(B, H, rows, dtype=torch.int32, device=k.device)
    parts = -(-N // PART)
    block, block_v = triton.next_power_of_2(D), triton.next_power_of_2(v.shape[-1])
    with launching(k.device):
        _pack_kernel[(parts * B * H,)](
            k,
            v,
            begins.contiguous(),
            upto,
            keys,
            values,
            counts,
            *k.stride()[:3],
            *v.stride()[:3],
            H,
            N,
            parts,
            rows,
            D=D,
            D_PAD=block,
            DV=v.shape[-1],
            DV_PAD=block_v,
            LENGTH=PART,
            MEAN=mean_keys,
            num_warps=warps_of(max(block, block_v)),
            num_stages=1,
        )
    return keys, values, counts


def variants() -> list[Variant]:
    """Every form of launch for the shapes that matter."""
    found = [
        (64, torch.bfloat16, 0),
        (80, torch.float16, 2),
        (256, torch.float32, 1),
    ]
    packed = [(64, torch.bfloat16, False), (80, torch.float16, True), (256, torch.float32, False)]
    return [_find_variant(*form) for form in found] + [_pack_variant(*form) for form in packed]


def _find_variant(D: int, dtype: torch.dtype, measure: int) -> Variant:
    sizes = [n for n in _find_kernel.arg_names if n.startswith("stride_")]
    sizes += ["heads", "tokens", "chunks", "chunk", "single", "first"]
    types = dict.fromkeys(sizes, "i32") | {"k_ptr": TYPES[dtype], "theta_ptr": "*fp32", "out_ptr": "*i1"}
    block = triton.next_power_of_2(D)
    name = f"runs find D{D} {TYPES[dtype][1:]} {list(MEASURES)[measure]}"
    constants = {"D": D, "D_PAD": block, "MEASURE": measure}
    return Variant(name, _find_kernel, types, constants, warps_of(block), 1, pipelined=False, loose=frozenset(sizes))


def _pack_variant(D: int, dtype: torch.dtype, mean: bool) -> Variant:
    sizes = [n for n in _pack_kernel.arg_names if n.startswith("stride_")] + ["heads", "tokens", "parts", "rows"]
    types = dict.fromkeys(sizes, "i32") | dict.fromkeys(("k_ptr", "v_ptr", "keys_ptr", "values_ptr"), TYPES[dtype])
    types |= {"begins_ptr": "*i1", "upto_ptr": "*i32", "counts_ptr": "*i32"}
    block = triton.next_power_of_2(D)
    name = f"runs pack D{D} {TYPES[dtype][1:]}{' mean' if mean else ''}"
    constants = {"D": D, "D_PAD": block, "DV": D, "DV_PAD": block, "LENGTH": PART, "MEAN": mean}
    return Variant(name, _pack_kernel, types, constants, warps_of(block), 1, pipelined=False, loose=frozenset(sizes))
