"""Conversions and figures of a layout: block mask, element mask, kept mass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .block_layout import BlockLayout


def scatter_lists(idx: Tensor, num: Tensor, n_k: int) -> Tensor:
    """Lists idx (R, K), num (R,) to a bool mask (R, n_k). Unused entries go to one spare column that is cut off."""
    slot = torch.arange(idx.shape[-1], device=idx.device)
    cols = idx.to(torch.int64).masked_fill(slot >= num.unsqueeze(-1), n_k)
    mask = torch.zeros(idx.shape[0], n_k + 1, dtype=torch.bool, device=idx.device)
    return mask.scatter_(1, cols, True)[:, :n_k]


def full_mask(layout: BlockLayout, b: int, h: int) -> Tensor:
    """(Nq, Nk) bool mask of the FULL blocks of one sample and head of the layout."""
    idx, num = layout.kv_idx[b, h], layout.kv_num[b, h]
    complete = int(layout.valid_blocks[b if layout.valid_blocks.shape[0] > 1 else 0])
    whole = num == complete
    mask = scatter_lists(idx, num.masked_fill(whole, 0), layout.n_k)
    mask[whole, :complete] = True
    return mask


def head_mask(layout: BlockLayout, b: int, h: int) -> Tensor:
    """(Nq, Nk) bool mask of all computed blocks of one sample and head."""
    mask = full_mask(layout, b, h)
    if layout.part_idx is not None and layout.part_num is not None:
        mask |= scatter_lists(layout.part_idx[b, h], layout.part_num[b, h], layout.n_k)
    return mask


def to_bool(layout: BlockLayout) -> Tensor:
    """See :meth:`BlockLayout.to_bool`."""
    rows = [head_mask(layout, b, h) for b in range(layout.batch) for h in range(layout.heads)]
    return torch.stack(rows).unflatten(0, (layout.batch, layout.heads))


def kept_mass(layout: BlockLayout, W: Tensor) -> Tensor:
    """See :meth:`BlockLayout.kept_mass`. Head by head, so that no second tensor of W's size exists."""
    share = torch.empty(W.shape[:2], dtype=torch.float32, device=W.device)
    for b in range(W.shape[0]):
        for h in range(W.shape[1]):
            mask = head_mask(layout, b if layout.batch > 1 else 0, h if layout.heads > 1 else 0)
            share[b, h] = W[b, h].masked_fill(~mask, 0).sum() / W[b, h].sum()
    return share


def element_mask(layout: BlockLayout) -> Tensor:
    """See :meth:`BlockLayout.element_mask`."""
    batch = layout.batch
    for x in (layout.q_seg, layout.kv_seg):
        if x is not None and x.dim() == 2:
            batch = max(batch, x.shape[0])
    if layout.kv_lens is not None:
        batch = max(batch, layout.kv_lens.numel())
    shape = (batch, layout.heads, layout.q_len, layout.kv_len)
    mask = torch.empty(shape, dtype=torch.bool, device=layout.device)
    for b in range(batch):
        for h in range(layout.heads):
            mask[b, h] = _head_elements(layout, b, h)
    return mask


def _head_elements(layout: BlockLayout, b: int, h: int) -> Tensor:
    """(q_len, kv_len) bool mask of sample ``b`` and head ``h``."""
    lb = b if layout.batch > 1 else 0
    bq, bk = layout.block_q, layout.block_k

    def grow(blocks: Tensor) -> Tensor:
        return blocks.repeat_interleave(bq, 0).repeat_interleave(bk, 1)[: layout.q_len, : layout.kv_len]

    device = layout.device
    q_pos = torch.arange(layout.q_len, device=device).view(-1, 1)
    k_pos = torch.arange(layout.kv_len, device=device).view(1, -1)
    mask = grow(full_mask(layout, lb, h))
    if layout.part_idx is not None and layout.part_num is not None:
        part = grow(scatter_lists(layout.part_idx[lb, h], layout.part_num[lb, h], layout.n_k))
        part = part & layout.rule.pairs(b, q_pos, k_pos)
        if layout.part_bits is not None:
            part = part & _stored_bits(layout, lb, h)
        mask = mask | part
    if layout.kv_lens is not None:
        mask = mask & (k_pos < layout.kv_lens[b if layout.kv_lens.numel() > 1 else 0])
    return mask


def _stored_bits(layout: BlockLayout, b: int, h: int) -> Tensor:
    """(q_len, kv_len) bool: the stored row bits of the partial blocks, False elsewhere."""
    assert layout.part_idx is not None
    assert layout.part_num is not None
    n_q, bq, bk = layout.n_q, layout.block_q, layout.block_k
    bits = layout.partial_bits(b, h, torch.arange(n_q, device=layout.device))
    assert bits is not None
    grid = torch.zeros(n_q, bq, layout.n_k, bk, dtype=torch.bool, device=layout.device)
    for p in range(n_q):
        for slot in range(int(layout.part_num[b, h, p])):
            grid[p, :, int(layout.part_idx[b, h, p, slot])] = bits[p, slot]
    return grid.view(n_q * bq, -1)[: layout.q_len, : layout.kv_len]
