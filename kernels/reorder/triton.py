"""Reordering of tokens on a GPU: one pass over up to three tensors; where a token stands is computed, not looked up."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu import Variant, launching
from .orders import Grid, address_table

ROWS, WARPS = 64, 4
MOST = 3  # tensors of one launch
TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int8: "*i8"}


@triton.jit
def place_of(n, table, head, start, stop):
    """Where token n (int32, any shape) of ``head`` stands in the model's own order; text stays where it is."""
    n1, n2 = tl.load(table + head * 5), tl.load(table + head * 5 + 1)
    s0, s1, s2 = tl.load(table + head * 5 + 2), tl.load(table + head * 5 + 3), tl.load(table + head * 5 + 4)
    i = n - start
    moved = (i // (n1 * n2)) * s0 + (i // n2 % n1) * s1 + (i % n2) * s2
    return tl.where((n >= start) & (n < stop), moved + start, n)


@triton.jit
def _move(x, out, x_b, x_h, x_n, b, h, kv, heads, n, live, place, N, D: tl.constexpr, D_PAD: tl.constexpr, INVERSE):
    col = tl.arange(0, D_PAD)
    inside = live[:, None] & (col < D)[None, :]
    source, target = place, n
    if INVERSE:
        source, target = n, place
    rows = tl.load(x + b * x_b + kv * x_h + source.to(tl.int64)[:, None] * x_n + col[None, :], mask=inside, other=0.0)
    at = out + ((b * heads + h) * N + target.to(tl.int64)[:, None]) * D + col[None, :]
    tl.store(at, rows, mask=inside)


@triton.jit
def reorder_kernel(
    x0,
    x1,
    x2,
    out0,
    out1,
    out2,
    table,
    x0_b,
    x0_h,
    x0_n,
    x1_b,
    x1_h,
    x1_n,
    x2_b,
    x2_h,
    x2_n,
    heads,
    group0,
    group1,
    group2,
    start,
    stop,
    N,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BM: tl.constexpr,
    COUNT: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """Grid (tiles of N * B * heads, tensors). The outputs are contiguous (B, heads, N, D)."""
    tiles = tl.cdiv(N, BM)
    tile, bh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    n = tile * BM + tl.arange(0, BM)
    live = n < N
    place = place_of(n, table, h, start, stop)
    which = tl.program_id(1)
    if which == 0:
        _move(x0, out0, x0_b, x0_h, x0_n, b, h, h // group0, heads, n, live, place, N, D, D_PAD, INVERSE)
    if COUNT > 1:  # noqa: SIM102 (known when the kernel is compiled, the other is not)
        if which == 1:
            _move(x1, out1, x1_b, x1_h, x1_n, b, h, h // group1, heads, n, live, place, N, D, D_PAD, INVERSE)
    if COUNT > 2:  # noqa: SIM102
        if which == 2:
            _move(x2, out2, x2_b, x2_h, x2_n, b, h, h // group2, heads, n, live, place, N, D, D_PAD, INVERSE)


def reorder_triton(xs: Sequence[Tensor], codes: Sequence[int], grid: Grid, start: int, inverse: bool) -> list[Tensor]:
    """See :func:`patchkit.kernels.reorder_heads`; up to three tensors of one dtype, length and head size."""
    heads, (B, _, N, D) = len(codes), xs[0].shape
    outs = [torch.empty(B, heads, N, D, dtype=x.dtype, device=x.device) for x in xs]
    if not outs[0].numel():
        return outs
    table = address_table(tuple(codes), grid, xs[0].device)
    wide = [*xs, *[xs[0]] * (MOST - len(xs))]
    with launching(xs[0].device):
        reorder_kernel[(-(-N // ROWS) * B * heads, len(xs))](
            *wide,
            *outs,
            *[outs[0]] * (MOST - len(xs)),
            table,
            *(s for x in wide for s in x.stride()[:3]),
            heads,
            *(heads // x.shape[1] for x in wide),
            start,
            start + grid[0] * grid[1] * grid[2],
            N,
            D=D,
            D_PAD=triton.next_power_of_2(D),
            BM=ROWS,
            COUNT=len(xs),
            INVERSE=inverse,
            num_warps=WARPS,
        )
    return outs


def variants() -> list[Variant]:
    """Every form of launch for the shapes that matter."""
    forms = [(64, torch.bfloat16, 3), (128, torch.bfloat16, 3), (64, torch.float16, 1), (128, torch.float32, 3)]
    forms += [(80, torch.bfloat16, 3)]
    return [_variant(*form, inverse) for form in forms for inverse in (False, True)]


def _variant(D: int, dtype: torch.dtype, count: int, inverse: bool) -> Variant:
    constants = {"D": D, "D_PAD": triton.next_power_of_2(D), "BM": ROWS, "COUNT": count, "INVERSE": inverse}
    types: dict[str, str] = {}
    for name in reorder_kernel.arg_names:
        if name in constants:
            continue
        tensor = name in ("x0", "x1", "x2", "out0", "out1", "out2")
        types[name] = TYPES[dtype] if tensor else "*i32" if name == "table" else "i32"
    loose = frozenset(("heads", "group0", "group1", "group2", "start", "stop", "N"))
    name = f"reorder D{D} {TYPES[dtype][1:]} x{count}{' inverse' if inverse else ''}"
    return Variant(name, reorder_kernel, types, constants, WARPS, 1, pipelined=False, loose=loose)
