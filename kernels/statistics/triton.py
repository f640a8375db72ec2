"""Statistics of the blocks of an attention map on a GPU: a tile of query rows walks over the keys, one QK pass."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu import Variant, launching

LOG2E = tl.constexpr(1.4426950408889634)
LARGEST_HEAD = {2: 128, 4: 32}  # larger ones of fp32, held three times over, spill
TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}


@triton.jit(do_not_specialize=["heads", "group", "q_len", "kv_len"])
def statistics_kernel(
    q,
    k,
    lse,
    total,
    peak,
    small,
    q_b,
    q_h,
    q_n,
    k_b,
    k_h,
    k_n,
    heads,
    group,
    q_len,
    kv_len,
    n_q,
    n_k,
    scale2,
    eps,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (n_q * B * heads). lse (B, heads, q_len) and the outputs (B, heads, n_q, n_k) are contiguous."""
    p, bh = tl.program_id(0) % n_q, tl.program_id(0) // n_q
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    i, col = p * BLOCK + tl.arange(0, BLOCK), tl.arange(0, D_PAD)
    live = i < q_len
    at = q + b * q_b + h * q_h + i.to(tl.int64)[:, None] * q_n + col[None, :]
    q_tile = tl.load(at, mask=live[:, None] & (col < D)[None, :], other=0.0)
    shift = tl.load(lse + bh.to(tl.int64) * q_len + i, mask=live, other=float("inf")) * LOG2E
    k_head = k + b * k_b + (h // group) * k_h
    out = (bh.to(tl.int64) * n_q + p) * n_k
    for j in range(n_k):
        n = j * BLOCK + tl.arange(0, BLOCK)
        here = n < kv_len
        rows = k_head + n.to(tl.int64)[None, :] * k_n + col[:, None]
        k_tile = tl.load(rows, mask=here[None, :] & (col < D)[:, None], other=0.0)  # (D_PAD, BLOCK)
        s = tl.dot(q_tile, k_tile, input_precision=PRECISION) * scale2 - shift[:, None]
        inside = live[:, None] & here[None, :]
        prob = tl.where(inside, tl.exp2(s), 0.0)
        few = tl.where(inside & (prob < eps), 1.0, 0.0)
        tl.store(total + out + j, tl.sum(tl.sum(prob, 1), 0))
        tl.store(peak + out + j, tl.max(tl.max(prob, 1), 0))
        tl.store(small + out + j, tl.sum(tl.sum(few, 1), 0))


def launch_form(D: int, bytes_per: int, block: int) -> tuple[int, int]:
    """(warps, pipeline stages). From the compile gate, not timed."""
    wide = bytes_per == 4  # three products of parts of fp32 want twice the registers
    return max(1, min(8, block // 16 * (2 if wide else 1))), 2 if wide or block > 64 else 3


def unsupported(q: Tensor, block: int) -> str | None:
    """What this kernel cannot do of a call, or None."""
    if block not in (16, 32, 64, 128):
        return f"blocks of {block}: they must be 16, 32, 64 or 128"
    if q.dtype not in TYPES or q.shape[-1] > LARGEST_HEAD[q.element_size()]:
        return f"head size {q.shape[-1]} in {q.dtype}"
    return None


def block_statistics_triton(
    q: Tensor, k: Tensor, lse: Tensor, block: int, eps: float, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`patchkit.kernels.block_statistics`."""
    B, H, q_len, D = q.shape
    n_q, n_k = -(-q_len // block), -(-k.shape[2] // block)
    outs = [torch.empty(B, H, n_q, n_k, dtype=torch.float32, device=q.device) for _ in range(3)]
    if outs[0].numel():
        warps, stages = launch_form(D, q.element_size(), block)
        exact = q.dtype == torch.float32 and (q.device.type != "cuda" or torch.version.hip is not None)
        with launching(q.device):
            statistics_kernel[(n_q * B * H,)](
                *(q, k, lse.float().contiguous(), *outs, *q.stride()[:3], *k.stride()[:3]),
                *(H, H // k.shape[1], q_len, k.shape[2], n_q, n_k, scale * LOG2E.value, eps),
                D=D,
                D_PAD=max(16, triton.next_power_of_2(D)),
                BLOCK=block,
                PRECISION="ieee" if exact else "tf32x3",
                num_warps=warps,
                num_stages=stages,
            )
    return outs[0], outs[1], outs[2]


def variants() -> list[Variant]:
    """Every form of launch for the shapes that matter."""
    forms = [(64, torch.bfloat16, 64), (128, torch.bfloat16, 64), (64, torch.float16, 32), (128, torch.float16, 128)]
    return [_variant(*form) for form in [*forms, (80, torch.bfloat16, 64), (32, torch.float32, 64)]]


def _variant(D: int, dtype: torch.dtype, block: int) -> Variant:
    constants = {"D": D, "D_PAD": triton.next_power_of_2(D), "BLOCK": block, "PRECISION": "tf32x3"}
    types = dict.fromkeys(set(statistics_kernel.arg_names) - set(constants), "i32")
    types |= {"q": TYPES[dtype], "k": TYPES[dtype], "scale2": "fp32", "eps": "fp32"}
    types |= dict.fromkeys(("lse", "total", "peak", "small"), "*fp32")
    warps, stages = launch_form(D, dtype.itemsize, block)
    loose = frozenset(("heads", "group", "q_len", "kv_len", "n_q", "n_k"))
    name = f"statistics D{D} {TYPES[dtype][1:]} {block}"
    return Variant(name, statistics_kernel, types, constants, warps, stages, loose=loose)
