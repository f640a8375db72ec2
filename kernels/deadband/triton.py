"""The dead-band filter on a GPU: one program a head walks along the tokens, the reference row in registers."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu import Variant, launching

LARGEST_HEAD = 1024
TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}


@triton.jit(do_not_specialize=["heads", "tokens"])
def _dead_band_kernel(
    k_ptr,
    theta_ptr,
    ref_ptr,
    start_ptr,
    out_ptr,
    kept_ptr,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_rb,
    stride_rh,
    heads,
    tokens,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_START: tl.constexpr,
):
    """out (B, H, N, D) and kept (B, H, N), both contiguous; theta (B, H)."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // heads, bh % heads
    d = tl.arange(0, D_PAD)
    live = d < D
    theta = tl.load(theta_ptr + bh)
    first = 0
    if HAS_START:
        first = tl.load(start_ptr + b).to(tl.int32)
    p_k = k_ptr + b * stride_kb + h * stride_kh + d
    p_out = out_ptr + bh * tokens * D + d
    r = tl.load(p_k, mask=live, other=0.0).to(tl.float32)
    if HAS_REF:
        r = tl.load(ref_ptr + b * stride_rb + h * stride_rh + d, mask=live, other=0.0).to(tl.float32)
    for n in range(tokens):
        row = tl.load(p_k, mask=live, other=0.0).to(tl.float32)
        keep = tl.abs(row - r) > theta
        if not HAS_REF:
            keep = keep | (n <= first)
        r = tl.where(keep, row, r)
        tl.store(p_out, r.to(out_ptr.dtype.element_ty), mask=live)
        count = tl.sum((keep & live).to(tl.int32), 0)
        tl.store(kept_ptr + bh * tokens + n, tl.where(n >= first, count, 0))
        p_k += stride_kn
        p_out += D


def unsupported(k: Tensor) -> str | None:
    """What this kernel cannot do of a call, or None."""
    if k.dtype not in TYPES:
        return f"no kernel for {k.dtype}"
    if k.shape[-1] > LARGEST_HEAD:
        return f"head size {k.shape[-1]} is larger than {LARGEST_HEAD}"
    return "the last dimension is strided" if k.stride(-1) != 1 else None


def warps_of(block: int) -> int:
    """A token's elements side by side: one warp up to 128 of them."""
    return max(1, block // 128)


def dead_band_triton(k: Tensor, theta: Tensor, reference: Tensor | None, start: Tensor | None) -> tuple[Tensor, Tensor]:
    """See :func:`patchkit.kernels.dead_band`; ``theta`` (B, Hkv) fp32 contiguous."""
    B, H, N, D = k.shape
    out = torch.empty(B, H, N, D, dtype=k.dtype, device=k.device)
    kept = torch.empty(B, H, N, dtype=torch.int32, device=k.device)
    if reference is not None and reference.stride(-1) != 1:
        reference = reference.contiguous()
    block = triton.next_power_of_2(D)
    with launching(k.device):
        _dead_band_kernel[(B * H,)](
            k,
            theta,
            reference,
            None if start is None else start.to(k.device).contiguous(),
            out,
            kept,
            *k.stride()[:3],
            *((0, 0) if reference is None else reference.stride()[:2]),
            H,
            N,
            D=D,
            D_PAD=block,
            HAS_REF=reference is not None,
            HAS_START=start is not None,
            num_warps=warps_of(block),
            num_stages=1,
        )
    return out, kept


def variants() -> list[Variant]:
    """Every form of launch for the shapes that matter."""
    forms = [
        (64, torch.bfloat16, False, False),
        (80, torch.float16, False, True),
        (256, torch.float32, True, False),
    ]
    return [_variant(*form) for form in forms]


def _variant(D: int, dtype: torch.dtype, reference: bool, start: bool) -> Variant:
    sizes = [n for n in _dead_band_kernel.arg_names if n.startswith("stride_")] + ["heads", "tokens"]
    types = dict.fromkeys(sizes, "i32")
    types |= {"k_ptr": TYPES[dtype], "out_ptr": TYPES[dtype], "theta_ptr": "*fp32", "kept_ptr": "*i32"}
    block = triton.next_power_of_2(D)
    constants: dict[str, object] = {"D": D, "D_PAD": block, "HAS_REF": reference, "HAS_START": start}
    for name, on, kind in (("ref_ptr", reference, TYPES[dtype]), ("start_ptr", start, "*i64")):
        if on:
            types[name] = kind
        else:
            constants[name] = None
    flags = " ".join(name for name, on in (("reference", reference), ("start", start)) if on)
    return Variant(
        f"deadband D{D} {TYPES[dtype][1:]} {flags}".strip(),
        _dead_band_kernel,
        types,
        constants,
        num_warps=warps_of(block),
        num_stages=1,
        pipelined=False,
        loose=frozenset(sizes),
    )
