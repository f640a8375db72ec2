"""The lists of a layout the other way round: which query blocks attend to each key block.

What the gradients of k and v loop over. Lists of all key blocks lie in one flat tensor behind each other, because their
lengths differ far more than those of the rows: a sink is kept by every query block, most keys by few. Complete rows,
which attend to every key block, would add Nq * Nk entries; they are one list per head that every key block shares.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .build import index_dtype

if TYPE_CHECKING:
    from .block_layout import BlockLayout


class Transposed(NamedTuple):
    """Query blocks of each key block, ascending, per (B', H').

    Attributes:
        complete_idx: (B', H', C) int16 or int32, the complete query blocks. Each attends to every *valid* key block.
        complete_num: (B', H') int32.
        full_idx: flat int16 or int32, query blocks that list a key block as full; complete ones are not among them.
        full_start: (B', H', Nk) int64, where the list of a key block starts in ``full_idx``.
        full_num: (B', H', Nk) int32, its length.
        part_idx: the same for partial blocks; None where the layout has none.
        part_slot: flat int32: at which place of its row's list the partial block stands (its row bits stand there).
        part_start: see ``full_start``.
        part_num: see ``full_num``.
    """

    complete_idx: Tensor
    complete_num: Tensor
    full_idx: Tensor
    full_start: Tensor
    full_num: Tensor
    part_idx: Tensor | None = None
    part_slot: Tensor | None = None
    part_start: Tensor | None = None
    part_num: Tensor | None = None

    def counts(self, valid_blocks: Tensor) -> Tensor:
        """(B', H', Nk) int64: query blocks that attend to each key block. ``valid_blocks`` is the layout's."""
        n_k = self.full_num.shape[-1]
        reached = torch.arange(n_k, device=self.full_num.device) < valid_blocks
        found = self.full_num + self.complete_num.unsqueeze(-1) * reached
        return (found if self.part_num is None else found + self.part_num).to(torch.int64)


def transposed(layout: BlockLayout) -> Transposed:
    """The transposed lists of ``layout``, made once and kept with it. Head by head: no temporary of all heads' size."""
    return layout.derived("transposed", lambda: _build(layout))


def _build(layout: BlockLayout) -> Transposed:
    complete = layout.kv_num == layout.valid_blocks
    width = max(1, int(complete.sum(-1).max()))
    # Stable: the complete rows come first, ascending.
    first = torch.sort((~complete).to(torch.uint8), dim=-1, stable=True).indices[..., :width]
    full = _lists(layout.kv_idx, layout.kv_num.masked_fill(complete, 0), layout.n_k)
    found = Transposed(
        first.to(index_dtype(layout.n_q)).contiguous(), complete.sum(-1, dtype=torch.int32), full[0], *full[2:]
    )
    if layout.part_idx is None or layout.part_num is None:
        return found
    part = _lists(layout.part_idx, layout.part_num, layout.n_k)
    return found._replace(part_idx=part[0], part_slot=part[1], part_start=part[2], part_num=part[3])


def _lists(idx: Tensor, num: Tensor, n_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lists idx (B', H', Nq, K), num (B', H', Nq) to flat query blocks and slots, starts and lengths (B', H', Nk)."""
    small = index_dtype(num.shape[-1])
    slot = torch.arange(idx.shape[-1], device=idx.device)
    blocks, slots, counts = [], [], []
    for head_idx, head_num in zip(idx.flatten(0, 1), num.flatten(0, 1), strict=True):
        row, at = (slot < head_num.unsqueeze(-1)).nonzero(as_tuple=True)
        # Rows come ascending, and the sort keeps their order within each key block.
        key, order = torch.sort(head_idx[row, at], stable=True)
        blocks.append(row[order].to(small))
        slots.append(at[order].to(torch.int32))
        counts.append(torch.bincount(key, minlength=n_k))
    lengths = torch.stack(counts)
    starts = lengths.flatten().cumsum(0).view_as(lengths) - lengths
    shape = (*num.shape[:2], n_k)
    # Never empty: kernels take the address of the first entry.
    pad = blocks[0].new_zeros(1)
    return (
        torch.cat([*blocks, pad]),
        torch.cat([*slots, pad.to(torch.int32)]),
        starts.view(shape),
        lengths.to(torch.int32).view(shape),
    )
