"""Row top-k on a GPU: a row stays in registers, its k-th largest value is found bit by bit, no sort.

Radix selection on the integer form of the scores, one bit a round (32 rounds of compare and count).
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu import Variant, launching

LONGEST_ROW = 8192
TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
# Keys: see reference.sort_keys. The lowest integer marks columns that cannot be kept, the highest those that must be.
NEVER = tl.constexpr(-(2**31))
ALWAYS = tl.constexpr(2**31 - 1)
NAN = tl.constexpr(-(2**31) + 1)


@triton.jit(do_not_specialize=["heads", "rows", "columns", "width", "k_max", "first"])
def _row_topk_kernel(
    score_ptr,
    k_ptr,
    valid_ptr,
    forced_ptr,
    idx_ptr,
    num_ptr,
    stride_sb,
    stride_sh,
    stride_sr,
    stride_fb,
    stride_fh,
    stride_fr,
    stride_fn,
    heads,
    rows,
    columns,
    width,
    k_max,
    first,
    HAS_K: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_FORCED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """idx (B, H, rows, width) and num (B, H, rows), both contiguous; one row a program."""
    pid = tl.program_id(0).to(tl.int64)
    r, bh = pid % rows, pid // rows
    b, h = bh // heads, bh % heads
    n = tl.arange(0, BLOCK)
    if HAS_VALID:
        valid = tl.minimum(tl.maximum(tl.load(valid_ptr + b).to(tl.int32), 0), columns)
    else:
        valid = columns
    eligible = n < valid
    score = tl.load(score_ptr + b * stride_sb + h * stride_sh + r * stride_sr + n, mask=eligible, other=0.0)
    score = score.to(tl.float32)
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)  # -0.0 ties with 0.0
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = tl.where(score != score, NAN, key)
    if HAS_FORCED:
        p_forced = forced_ptr + b * stride_fb + h * stride_fh + r * stride_fr + n.to(tl.int64) * stride_fn
        forced = tl.load(p_forced, mask=eligible, other=0) != 0
        key = tl.where(forced, ALWAYS, key)
        extra = tl.sum(forced.to(tl.int32), 0)
    else:
        extra = 0
    key = tl.where(eligible, key, NEVER)
    if HAS_K:
        k = tl.minimum(tl.load(k_ptr + bh).to(tl.int32), k_max)
    else:
        k = k_max
    k = tl.minimum(tl.maximum(k, 0), valid - extra) + extra

    # The largest threshold that at least k keys reach, from the highest bit down. ``low`` counts upwards as an
    # unsigned number; the highest bit flipped, it is compared as a signed one.
    low = tl.zeros([], dtype=tl.int32)
    for i in range(32):
        bit = tl.full([], 1, tl.int32) << (31 - i)
        reached = tl.sum((key >= ((low | bit) ^ NEVER)).to(tl.int32), 0)
        low = tl.where(reached >= k, low | bit, low)
    threshold = low ^ NEVER
    above = key > threshold
    level = (key == threshold).to(tl.int32)
    missing = k - tl.sum(above.to(tl.int32), 0)
    keep = above | ((level != 0) & (tl.cumsum(level, 0) <= missing))
    slot = tl.cumsum(keep.to(tl.int32), 0) - 1
    p_idx = idx_ptr + pid * width
    tl.store(p_idx + slot, (n + first).to(idx_ptr.dtype.element_ty), mask=keep & (slot < width))
    tl.store(p_idx + n, tl.zeros([BLOCK], dtype=idx_ptr.dtype.element_ty), mask=(n >= k) & (n < width))
    tl.store(num_ptr + pid, k)


def warps_of(block: int) -> int:
    """Warps for rows of up to ``block`` entries: 32 entries a thread, and one warp alone as long as that is enough."""
    return max(1, block // 1024)


def unsupported(scores: Tensor) -> str | None:
    """What this kernel cannot do of a call, or None."""
    if scores.shape[-1] > LONGEST_ROW:
        return f"rows of {scores.shape[-1]} entries are longer than {LONGEST_ROW}"
    if scores.dtype not in TYPES:
        return f"no kernel for {scores.dtype}"
    if scores.stride(-1) != 1 and scores.shape[-1] > 1:
        return "the last dimension is strided"
    return None


def row_topk_triton(
    scores: Tensor,
    k: Tensor | None,
    k_max: int,
    valid: Tensor | None,
    forced: Tensor | None,
    first: int,
    width: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """See :func:`patchkit.kernels.topk.row_topk`; ``k`` (B, H), ``valid`` (B,) and ``forced`` (B, H, R, N) expanded."""
    B, H, rows, columns = scores.shape
    idx = torch.empty(B, H, rows, width, dtype=dtype, device=scores.device)
    num = torch.empty(B, H, rows, dtype=torch.int32, device=scores.device)
    block = max(16, triton.next_power_of_2(max(columns, width)))
    if num.numel():
        with launching(scores.device):
            _row_topk_kernel[(num.numel(),)](
                scores,
                None if k is None else k.contiguous(),
                None if valid is None else valid.contiguous(),
                forced,
                idx,
                num,
                *scores.stride()[:3],
                *((0, 0, 0, 0) if forced is None else forced.stride()),
                H,
                rows,
                columns,
                width,
                k_max,
                first,
                HAS_K=k is not None,
                HAS_VALID=valid is not None,
                HAS_FORCED=forced is not None,
                BLOCK=block,
                num_warps=warps_of(block),
                num_stages=1,
            )
    return idx, num


def variants() -> list[Variant]:
    """Every form of launch for the shapes that matter."""
    forms = [
        (256, torch.float32, "*i16", False, False, False),
        (512, torch.float32, "*i16", True, True, False),
        (1024, torch.bfloat16, "*i16", True, False, False),
        (2048, torch.float32, "*i16", False, False, False),
        (2048, torch.float32, "*i16", True, True, True),
        (2048, torch.float16, "*i16", False, True, False),
        (4096, torch.float32, "*i16", True, False, True),
        (8192, torch.float32, "*i32", True, True, True),
        (8192, torch.float32, "*i16", False, False, False),
    ]
    return [_variant(*form) for form in forms]


def _variant(block: int, dtype: torch.dtype, index: str, k: bool, valid: bool, forced: bool) -> Variant:
    sizes = [n for n in _row_topk_kernel.arg_names if n.startswith("stride_")]
    sizes += ["heads", "rows", "columns", "width", "k_max", "first"]
    types = dict.fromkeys(sizes, "i32")
    types |= {"score_ptr": TYPES[dtype], "idx_ptr": index, "num_ptr": "*i32"}
    constants: dict[str, object] = {"HAS_K": k, "HAS_VALID": valid, "HAS_FORCED": forced, "BLOCK": block}
    for name, on, kind in (("k_ptr", k, "*i32"), ("valid_ptr", valid, "*i32"), ("forced_ptr", forced, "*i1")):
        if on:
            types[name] = kind
        else:
            constants[name] = None
    flags = " ".join(name for name, on in (("k", k), ("valid", valid), ("forced", forced)) if on)
    name = f"topk {block} {TYPES[dtype][1:]} {index[1:]} {flags}".strip()
    return Variant(
        name,
        _row_topk_kernel,
        types,
        constants,
        num_warps=warps_of(block),
        num_stages=1,
        pipelined=False,
        loose=frozenset(sizes),
    )
