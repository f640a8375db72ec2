"""Exchange with FlexAttention's ``BlockMask`` (torch.nn.attention.flex_attention), imported only when used."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .build import stack_lists
from .convert import full_mask, scatter_lists

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from .block_layout import BlockLayout


def _dense_lists(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(Nq, Nk) bool to flex's form: indices (Nq, Nk) int32 with the kept ones first, and counts."""
    order = torch.sort(~mask, dim=-1, stable=True).indices
    return order.to(torch.int32), mask.sum(-1, dtype=torch.int32)


def to_flex(layout: BlockLayout) -> BlockMask:
    """See :meth:`BlockLayout.to_flex`. Blocks cut by the end of the keys become partial with a length test."""
    from torch.nn.attention.flex_attention import BlockMask

    full, part = [], []
    lens = layout.kv_lens
    shortest = layout.kv_len if lens is None else int(lens.min())
    for b in range(layout.batch):
        for h in range(layout.heads):
            whole = full_mask(layout, b, h)
            some = torch.zeros_like(whole)
            if layout.part_idx is not None and layout.part_num is not None:
                some = scatter_lists(layout.part_idx[b, h], layout.part_num[b, h], layout.n_k)
            cut = shortest // layout.block_k
            if shortest < layout.kv_len:
                some[:, cut:] |= whole[:, cut:]
                whole[:, cut:] = False
            full.append(_dense_lists(whole))
            part.append(_dense_lists(some))
    full_idx, full_num = stack_lists(full, layout.batch, layout.heads)
    part_idx, part_num = stack_lists(part, layout.batch, layout.heads)
    elements = layout.element_mask() if bool(part_num.any()) else None

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if elements is None:
            return k < layout.kv_len
        return elements[b * (elements.shape[0] > 1), h * (elements.shape[1] > 1), q, k]

    return BlockMask.from_kv_blocks(
        part_num,
        part_idx,
        full_num,
        full_idx,
        BLOCK_SIZE=(layout.block_q, layout.block_k),
        mask_mod=mask_mod,
        seq_lengths=(layout.q_len, layout.kv_len),
        compute_q_blocks=False,
    )


def from_flex(block_mask: BlockMask) -> BlockLayout:
    """See :meth:`BlockLayout.from_flex`."""
    from .block_layout import BlockLayout

    block_q, block_k = block_mask.BLOCK_SIZE
    q_len, kv_len = block_mask.seq_lengths
    num = block_mask.kv_num_blocks
    batch, heads, n_q = num.shape
    n_k = -(-kv_len // block_k)

    def grid(idx: Tensor | None, count: Tensor | None) -> Tensor:
        if idx is None or count is None:
            return torch.zeros(batch, heads, n_q, n_k, dtype=torch.bool, device=num.device)
        return scatter_lists(idx.flatten(0, 2), count.flatten(), n_k).view(batch, heads, n_q, n_k)

    some = grid(block_mask.kv_indices, num)
    whole = grid(block_mask.full_kv_indices, block_mask.full_kv_num_blocks)

    def element(b: Tensor, h: Tensor, i: Tensor, n: Tensor) -> Tensor:
        p, j = i // block_q, n // block_k
        return (block_mask.mask_mod(b, h, i, n) & some[b, h, p, j]) | whole[b, h, p, j]

    return BlockLayout.from_mask_mod(
        element,
        block_q=block_q,
        block_k=block_k,
        q_len=q_len,
        kv_len=kv_len,
        batch=batch,
        heads=heads,
        device=num.device,
    )
