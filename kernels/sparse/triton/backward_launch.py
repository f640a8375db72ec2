"""Host side of the backward kernels: what is derived once per layout, and the launches.

Nothing here reads a tensor's values on the host, except once per layout (``BlockLayout.derived``).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...gpu import launching
from ...layout import BlockLayout
from ...layout.transpose import Transposed, transposed
from .backward_kv import dkv_kernel
from .backward_q import dq_kernel
from .backward_steps import rows_kernel
from .backward_table import constants_of, tiles_of
from .table import padded

ROWS = 32
# A list this many times as long as the mean starts before all others.
HEAVY = 2


def block_sparse_backward_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
    layout: BlockLayout,
    scale: float,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See ``backward_reference``; ``needs`` tells which of dq, dk, dv to compute, the others are None."""
    if dout is None:
        dout = q.new_zeros(q.shape[-1]).expand(q.shape)
    with launching(q.device):
        shift, delta = _rows(out, dout, lse, dlse)
        dq = _dq(q, k, v, dout, shift, delta, layout, scale) if needs[0] else None
        dk = dv = None
        if needs[1] or needs[2]:
            dk, dv = _dkv(q, k, v, dout, shift, delta, layout, scale, needs[1])
    return dq, dk, dv if needs[2] else None


def _rows(out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None) -> tuple[Tensor, Tensor]:
    """Launch ``rows_kernel``: shift and delta (B, H, q_len)."""
    B, H, n, D = out.shape
    lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
    shift, delta = torch.empty_like(lse), torch.empty_like(lse)
    rows_kernel[(-(-n // ROWS), B * H)](
        out,
        dout,
        lse,
        dlse,
        shift,
        delta,
        *out.stride()[:3],
        *dout.stride()[:3],
        H,
        n,
        D=D,
        D_PAD=padded(D),
        BM=ROWS,
        WITH_LSE=dlse is not None,
        num_warps=4,
    )
    return shift, delta


def _dq(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, shift: Tensor, delta: Tensor, layout: BlockLayout, scale: float
) -> Tensor:
    """Launch ``dq_kernel``."""
    B, H, _, D = q.shape
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tile, _ = tiles_of(padded(D), q.dtype, layout.block_q, layout.block_k)
    order = layout.derived(("backward.rows", B, H), lambda: launch_order(layout.listed.expand(B, H, -1)))
    part_idx = layout.part_idx
    dq_kernel[(order.numel() * (layout.block_q // tile.rows),)](
        q,
        k,
        v,
        dout,
        shift,
        delta,
        dq,
        layout.kv_idx.contiguous(),
        layout.kv_num.contiguous(),
        None if part_idx is None else part_idx.contiguous(),
        None if layout.part_num is None else layout.part_num.contiguous(),
        None if layout.part_bits is None else layout.part_bits.contiguous(),
        *_rule_tensors(layout),
        order,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *dout.stride()[:3],
        layout.heads * layout.n_q if layout.batch > 1 else 0,
        layout.n_q if layout.heads > 1 else 0,
        layout.kv_idx.shape[-1],
        0 if part_idx is None else part_idx.shape[-1],
        *_sample_strides(layout),
        H,
        H // k.shape[1],
        layout.n_q,
        layout.q_len,
        layout.kv_len,
        layout.causal_offset or 0,
        scale,
        scale * math.log2(math.e),
        **constants_of(layout, D, q.dtype, q.device.type, tile),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return dq


def _dkv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    shift: Tensor,
    delta: Tensor,
    layout: BlockLayout,
    scale: float,
    need_k: bool,
) -> tuple[Tensor | None, Tensor]:
    """Launch ``dkv_kernel``; dk is None unless ``need_k``."""
    B, H, _, D = q.shape
    heads = k.shape[1]
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device) if need_k else None
    _, tile = tiles_of(padded(D), q.dtype, layout.block_q, layout.block_k)
    lists: Transposed = transposed(layout)

    def order_of_keys() -> Tensor:
        counts = lists.counts(layout.valid_blocks).expand(B, H, -1)
        return launch_order(counts.unflatten(1, (heads, -1)).sum(2))

    order = layout.derived(("backward.keys", B, H, heads), order_of_keys)
    dkv_kernel[(order.numel() * (layout.block_k // tile.keys),)](
        q,
        k,
        v,
        dout,
        shift,
        delta,
        dk,
        dv,
        *lists,
        None if layout.part_bits is None else layout.part_bits.contiguous(),
        *_rule_tensors(layout),
        order,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *dout.stride()[:3],
        layout.heads if layout.batch > 1 else 0,
        1 if layout.heads > 1 else 0,
        lists.complete_idx.shape[-1],
        0 if layout.part_idx is None else layout.part_idx.shape[-1],
        *_sample_strides(layout),
        H,
        H // heads,
        layout.n_q,
        layout.n_k,
        layout.q_len,
        layout.kv_len,
        layout.causal_offset or 0,
        scale,
        scale * math.log2(math.e),
        EVEN=layout.q_len % layout.block_q == 0,
        NEED_K=need_k,
        **constants_of(layout, D, q.dtype, q.device.type, tile),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return dk, dv


def launch_order(counts: Tensor) -> Tensor:
    """(B, H, n) list lengths to (B * H * n,) int32 work items in launch order.

    Lists far longer than the mean (text rows, sinks) first, the longest at the front; then head after head, those with
    most work first, ascending inside a head, so that programs that run together share what they read in L2.
    """
    flat = counts.flatten().to(torch.int64)
    total = counts.sum(-1, dtype=torch.int64)
    per_head = total.unsqueeze(-1).expand(counts.shape).flatten()
    heavy = flat * max(1, flat.numel()) > HEAVY * flat.sum()
    by_head = torch.sort(per_head, descending=True, stable=True).indices
    weight = torch.where(heavy, flat, 0)[by_head]
    return by_head[torch.sort(weight, descending=True, stable=True).indices].to(torch.int32)


def _rule_tensors(layout: BlockLayout) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x.contiguous() for x in (layout.q_seg, layout.kv_seg, layout.kv_lens))


def _sample_strides(layout: BlockLayout) -> tuple[int, ...]:
    """Elements from one sample's segment ids to the next's, of queries and keys; 0 where all samples share them."""
    pair = (layout.q_seg, layout.kv_seg)
    return tuple(0 if x is None or x.dim() == 1 or x.shape[0] == 1 else x.shape[-1] for x in pair)
