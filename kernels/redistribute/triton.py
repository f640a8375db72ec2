"""Redistribution while decoding, on a GPU: the splits of :mod:`patchkit.kernels.classes.triton`, joined and edited.

Keys and values are read once, plus a byte a key. All heads come from here, also those that are not edited: these agree
with the dense kernel's to rounding, not to the bit.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..classes.triton.decode import joined
from ..classes.triton.launch import run_splits
from ..classes.triton.table import padded
from ..classes.triton.variants import LOOSE, NAMES
from ..gpu import Variant, launching
from .reference import CLASSES, OTHER, TARGET, TEXT_SINK, VISUAL_SINK

FIRST, SECOND, THIRD, FOURTH = (tl.constexpr(c) for c in (OTHER, TEXT_SINK, VISUAL_SINK, TARGET))
COUNT = tl.constexpr(CLASSES)


@triton.jit(do_not_specialize=["heads", "group", "splits"])
def redistribute_kernel(
    top,
    sums,
    values,
    allowed,
    out,
    selected,
    mass,
    heads,
    group,
    splits,
    recycle,
    rho,
    least,
    ROWS: tl.constexpr,
    S_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
):
    """Query head h of sample b: out (B, H, D), selected (B, H) bytes, mass (B, H) fp32."""
    bh = tl.program_id(0)
    first = (bh // group).to(tl.int64) * splits
    row = (bh % group) * COUNT
    _, s_other, v_other = joined(top, sums, values, first, row + FIRST, splits, ROWS, S_PAD, D_PAD)
    _, s_text, v_text = joined(top, sums, values, first, row + SECOND, splits, ROWS, S_PAD, D_PAD)
    _, s_seen, v_seen = joined(top, sums, values, first, row + THIRD, splits, ROWS, S_PAD, D_PAD)
    _, s_target, v_target = joined(top, sums, values, first, row + FOURTH, splits, ROWS, S_PAD, D_PAD)
    sink, tiny = s_text + s_seen, 1.1754943508222875e-38
    total = tl.maximum(s_other + sink + s_target, tiny)
    visual, target = (s_seen + s_target) / total, s_target / total
    inside = tl.load(allowed + bh // heads) != 0
    chosen = inside & (visual >= least) & (target >= rho * visual) & (s_target > 0)
    moved = tl.where(chosen, recycle * (sink / total), 0.0)
    value = (v_other + v_text + v_seen + v_target) / total
    value += moved * (v_target / tl.maximum(s_target, tiny) - (v_text + v_seen) / tl.maximum(sink, tiny))
    d = tl.arange(0, D_PAD)
    tl.store(out + bh.to(tl.int64) * D + d, value.to(out.dtype.element_ty), mask=d < D)
    tl.store(selected + bh, chosen.to(tl.int8))
    tl.store(mass + bh, moved)


def redistribute_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    classes: Tensor,
    allowed: Tensor,
    recycle: float,
    rho: float,
    least: float,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, H, 1, D), allowed (B,) bytes -> out (B, H, 1, D), selected (B, H, 1) bool, mass (B, H, 1) fp32."""
    B, H, _, D = q.shape
    made = run_splits(q, k, v, classes, CLASSES, scale, softcap)
    out = torch.empty((B, H, 1, D), dtype=q.dtype, device=q.device)
    selected = torch.empty((B, H, 1), dtype=torch.int8, device=q.device)
    mass = torch.empty((B, H, 1), dtype=torch.float32, device=q.device)
    with launching(q.device):
        redistribute_kernel[(B * H,)](
            *(*made, allowed, out, selected, mass, H, H // k.shape[1], made.splits, recycle, rho, least),
            ROWS=made.rows,
            S_PAD=1 << (made.splits - 1).bit_length(),
            D=D,
            D_PAD=padded(D),
            num_warps=4,
        )
    return out, selected.bool(), mass


def variants() -> list[Variant]:
    """Head sizes and dtypes of the joining kernel."""
    return [_variant(*form) for form in ((80, torch.float16), (128, torch.bfloat16), (64, torch.float32))]


def _variant(D: int, dtype: torch.dtype) -> Variant:
    types = {n: "i32" for n in redistribute_kernel.arg_names if not n.isupper()}
    types |= dict.fromkeys(("top", "sums", "values", "mass"), "*fp32") | {"out": f"*{NAMES[dtype]}"}
    types |= {"allowed": "*i8", "selected": "*i8"} | dict.fromkeys(("recycle", "rho", "least"), "fp32")
    constants = {"ROWS": 16, "S_PAD": 64, "D": D, "D_PAD": padded(D)}
    name = f"redistribute D{D} {NAMES[dtype]}"
    return Variant(name, redistribute_kernel, types, constants, 4, 3, pipelined=False, loose=LOOSE)
