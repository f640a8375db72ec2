"""Host side of the Triton kernels: what is derived once per layout, the launch table, and the launches.

Nothing here reads a tensor's values on the host, except once per layout (``BlockLayout.derived``).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...gpu import launching
from ...layout import BlockLayout
from .forward import forward_kernel, merge_kernel
from .pairs import pairs_of
from .table import constants_of, major_of, padded, tile_of

# A grid of fewer waves than this leaves multiprocessors idle at its end; longer lists are then cut. Unmeasured.
WAVES = 4
# Tiles of keys below which a part of a list is not worth its fp32 round trip through memory. Unmeasured.
SPLIT_TILES = 16
MERGE_ROWS = 32


class Lists(NamedTuple):
    """The tensors of a layout as the kernels index them: contiguous lists, strides 0 where something is shared."""

    kv_idx: Tensor
    kv_num: Tensor
    part_idx: Tensor | None
    part_num: Tensor | None
    part_bits: Tensor | None
    q_seg: Tensor | None
    kv_seg: Tensor | None
    kv_lens: Tensor | None


def block_sparse_triton(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float, num_splits: int = 1
) -> tuple[Tensor, Tensor]:
    """See :func:`patchkit.kernels.block_sparse_attention`; tensors are (B, H, N, D) views with contiguous D."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if not out.numel():
        return out, lse
    splits = splits_of(layout, q, num_splits)
    pairs = pairs_of(layout)
    steps = [layout] if pairs is None else list(pairs)
    slots = len(steps) * splits if splits > 1 else len(steps) - 1
    part = torch.empty((slots, *q.shape), dtype=torch.float32, device=q.device)
    part_lse = torch.empty((slots, *lse.shape), dtype=torch.float32, device=q.device)
    with launching(q.device):
        if splits > 1:
            for i, step in enumerate(steps):
                at = slice(i * splits, (i + 1) * splits)
                _forward(q, k, v, part[at], part_lse[at], step, scale, splits)
            _merge(part, part_lse, out, lse)
            return out, lse
        if pairs is not None:
            _forward(q, k, v, part, part_lse, pairs.shared, scale, 1)
        _forward(q, k, v, out, lse, steps[-1], scale, 1, None if pairs is None else (part, part_lse))
    return out, lse


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: BlockLayout,
    scale: float,
    splits: int,
    begun: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Launch the forward kernel; out ([splits,] B, H, N, D), lse likewise; ``begun``: fp32 result to go on from."""
    B, H = q.shape[:2]
    lists = layout.derived("triton.lists", lambda: _lists(layout))
    order = layout.derived(("triton.order", B, H), lambda: work_order(layout, B, H))
    tile = tile_of(q.shape[-1], q.dtype, layout.block_q, layout.block_k, major_of(q.device))
    forward_kernel[(order.numel() * (layout.block_q // tile.rows), splits)](
        *(q, k, v, out, lse, *(begun or (None, None)), *lists, order),
        *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
        *(out.stride(0) if splits > 1 else 0, *out.stride()[-4:-1], lse.stride(0) if splits > 1 else 0),
        layout.heads * layout.n_q if layout.batch > 1 else 0,
        layout.n_q if layout.heads > 1 else 0,
        lists.kv_idx.shape[-1],
        0 if lists.part_idx is None else lists.part_idx.shape[-1],
        _sample_stride(lists.q_seg),
        _sample_stride(lists.kv_seg),
        *(H, H // k.shape[1], layout.n_q, layout.q_len, layout.kv_len, layout.causal_offset or 0, splits),
        # The sign of the scale goes into q, so that scale2 is positive and the largest logit stays the largest.
        *((math.copysign(1.0, scale), abs(scale) * math.log2(math.e)) if scale else (0.0, 1.0)),
        **constants_of(layout, q.shape[-1], q.dtype, q.device.type, tile, begun is not None),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _merge(part: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor) -> None:
    """Join the parts (slots, B, H, N, D) of all rows."""
    B, H, n, D = out.shape
    merge_kernel[(-(-n // MERGE_ROWS), B * H)](
        *(part, part_lse, out, lse, part.stride(0), part_lse.stride(0), *out.stride()[:3], H, n, part.shape[0]),
        D=D,
        D_PAD=padded(D),
        BM=MERGE_ROWS,
        num_warps=4,
    )


def _sample_stride(seg: Tensor | None) -> int:
    """Elements from one sample's segment ids to the next's; 0 where all samples share them."""
    return 0 if seg is None or seg.dim() == 1 or seg.shape[0] == 1 else seg.stride(0)


def _lists(layout: BlockLayout) -> Lists:
    """The layout's tensors, contiguous (they are, unless somebody built the layout from views)."""
    others = (getattr(layout, name) for name in Lists._fields[2:])
    return Lists(
        layout.kv_idx.contiguous(), layout.kv_num.contiguous(), *(None if x is None else x.contiguous() for x in others)
    )


def work_order(layout: BlockLayout, B: int, H: int) -> Tensor:
    """(B * H * Nq,) int32: row blocks in launch order, flattened.

    Complete (text) rows first, for they take longest; then the heads by falling total length, so that the last wave
    consists of short work; rows ascending inside a head, so that programs that run together share keys in L2.
    """
    listed = layout.listed.sum(-1).broadcast_to(B, H).flatten()
    rank = torch.empty_like(listed, dtype=torch.int64)
    heads = torch.sort(listed, descending=True, stable=True).indices
    rank[heads] = torch.arange(B * H, device=listed.device)
    place = rank.view(B, H, 1) * layout.n_q + torch.arange(layout.n_q, device=listed.device)
    complete = (layout.kv_num == layout.valid_blocks).broadcast_to(place.shape)
    return torch.sort(torch.where(complete, place - place.numel(), place).flatten()).indices.to(torch.int32)


def longest_list(layout: BlockLayout) -> int:
    """Blocks of the longest row; reads the counts, once per layout."""
    return layout.derived("triton.longest", lambda: int(layout.listed.max()))


def splits_of(layout: BlockLayout, q: Tensor, at_least: int) -> int:
    """Parts each list is cut into: what the caller asks for, or more where the grid would not fill a GPU."""
    longest = max(1, longest_list(layout))
    if q.device.type != "cuda":
        return min(at_least, longest)
    tile = tile_of(q.shape[-1], q.dtype, layout.block_q, layout.block_k, major_of(q.device))
    programs = q.shape[0] * q.shape[1] * layout.n_q * (layout.block_q // tile.rows)
    wanted = WAVES * torch.cuda.get_device_properties(q.device).multi_processor_count
    worth = longest * (layout.block_k // tile.keys) // SPLIT_TILES
    return min(max(at_least, min(wanted // programs, worth)), longest)
