"""Launching the routed-heads kernel. Nothing here waits for the device."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...gpu import launching
from ...sparse.triton.table import major_of
from ..blocked import dense_parts
from ..dense import dense_heads
from ..reference import everywhere
from .forward import BY_KEY, BY_PAIR, NO_MASK, routed_kernel
from .table import Tile, padded, partial_keys, precision, tile_for


def routed_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    active: Tensor,
    shared: int,
    gates: Tensor | None,
    scale: float,
    causal: bool,
    mask: Tensor | None,
) -> Tensor:
    """See :func:`patchkit.kernels.routed_attention`; contiguous, zero where not active."""
    _, H, n, _ = q.shape
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    active = everywhere(active, shared)
    square = causal and n > 1
    if shared and mask is None and (not square or n == k.shape[2]):
        # Torch's own kernels are tuned for each GPU; a mask, or parts of a prompt, would cost them that.
        for heads, kv in dense_parts(shared, H // k.shape[1]):
            out[:, heads] = dense_heads(q[:, heads], k[:, kv], v[:, kv], scale, causal, None)
        if gates is not None:
            out[:, :shared] *= gates[:, :shared].unsqueeze(-1)
        active = active.clone()
        active[:, :shared] = False
    _launch(q, k, v, *row_lists(active, k.shape[1]), gates, out, scale, square, mask)
    return out


def row_lists(active: Tensor, kv_heads: int) -> tuple[Tensor, Tensor]:
    """Active rows of each KV head by token: (B * G, N * group + 1) int32 token * group + head, and (B * G,) counts.

    What stands behind the counted rows is not to be read.
    """
    B, H, n = active.shape
    table = active.view(B, kv_heads, H // kv_heads, n).transpose(2, 3).reshape(B * kv_heads, -1)
    upto = table.cumsum(-1, dtype=torch.int32)
    width = table.shape[1]
    place = torch.where(table, upto - 1, width).to(torch.int64)  # the last column takes what is not active
    number = torch.arange(width, dtype=torch.int32, device=active.device)
    rows = torch.empty(B * kv_heads, width + 1, dtype=torch.int32, device=active.device)
    rows.scatter_(1, place, number.expand_as(table))
    return rows, upto[:, -1].contiguous()


def bounds_of(mask: Tensor) -> Tensor:
    """(B, M) bool -> (B, 3) int32: first key shown, behind the last, and whether any between is hidden."""
    m = mask.shape[1]
    place = torch.arange(m, device=mask.device)
    first = torch.where(mask, place, m).amin(1)
    behind = torch.where(mask, place + 1, 0).amax(1)
    first = torch.minimum(first, behind)  # nothing shown: an empty range
    return torch.stack([first, behind, behind - first > mask.sum(1)], 1).to(torch.int32)


def constants_of(D: int, tile: Tile, causal: bool, mask: int, gates: bool, prec: str) -> dict[str, Any]:
    """Compile-time arguments."""
    return {
        "D": D,
        "D_PAD": padded(D),
        "BM": tile.rows,
        "BN": tile.keys,
        "BP": partial_keys(D, tile, mask != NO_MASK),
        "CAUSAL": causal,
        "MASK": mask,
        "GATES": gates,
        # A diagonal is a few steps: a pipeline would cost more shared memory than it hides. A mask may be all of them.
        "STAGES": tile.stages if mask else 1,
        "PRECISION": prec,
    }


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    counts: Tensor,
    gates: Tensor | None,
    out: Tensor,
    scale: float,
    causal: bool,
    mask: Tensor | None,
) -> None:
    B, H, n, D = q.shape
    G, m = k.shape[1:3]
    kind, bounds, strides = NO_MASK, None, (0, 0, 0)
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape)).expand(B, 1, -1, m)
        kind = BY_KEY if mask.shape[2] == 1 else BY_PAIR
        bounds = bounds_of(mask[:, 0, 0]) if kind == BY_KEY else None
        strides = (mask.stride(0), mask.stride(2), mask.stride(3))
        mask = mask.view(torch.uint8)
    tile = tile_for(D, q.dtype, kind != NO_MASK, major_of(q.device))
    tiles = -(-n * (H // G) // tile.rows)
    with launching(q.device):
        routed_kernel[(tiles * B * G,)](
            *(q, k, v, out, rows, counts, gates, mask, bounds),
            *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3]),
            *((0, 0, 0) if gates is None else gates.stride()),
            *strides,
            *(rows.shape[1], G, B, H // G, n, m),
            # The sign of the scale goes into q, so that scale2 is positive and the largest logit stays the largest.
            *((math.copysign(1.0, scale), abs(scale) * math.log2(math.e)) if scale else (0.0, 1.0)),
            **constants_of(D, tile, causal, kind, gates is not None, precision(q.dtype, q.device.type)),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
