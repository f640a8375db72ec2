"""Grouping of query blocks that can be computed together, read once per call from the layout's lists."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...layout import BlockLayout

# A run of consecutive key blocks is read in place. A single short one is not worth a kernel call of its own: it joins
# the gathered rows of equal length.
SHORT_RUN = 16


@dataclass(frozen=True)
class Group:
    """Query blocks with the same shape of work.

    Args:
        rows: their indices, ascending.
        run: (first, last + 1) key block when all of them attend to exactly that run, else None.
        full: (R, m) int64 key blocks to gather, without a ragged last block; None with ``run``.
        tail: whether the ragged last key block is attended as well (with ``full``).
        part: number of partial blocks per row.
    """

    rows: list[int]
    run: tuple[int, int] | None
    full: Tensor | None
    tail: bool
    part: int


def groups_of(layout: BlockLayout, b: int, h: int, keys: int) -> list[Group]:
    """Groups of one sample and head of the layout when ``keys`` keys are valid. Every query block is in one group."""
    num = layout.kv_num[b, h].to(torch.int64)
    idx = layout.kv_idx[b, h].to(torch.int64)
    valid = -(-keys // layout.block_k)
    ragged = valid - 1 if keys % layout.block_k else -1
    complete = num == int(layout.valid_blocks[b if layout.valid_blocks.shape[0] > 1 else 0])
    num = torch.where(complete, valid, num)
    first = idx[:, 0].masked_fill(complete, 0)
    last = idx.gather(-1, (num - 1).clamp(0, idx.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
    last = last.masked_fill(complete, valid - 1)
    is_run = (num > 0) & (last - first + 1 == num)
    part = layout.part_num[b, h] if layout.part_num is not None else torch.zeros_like(num)
    table = torch.stack([num, first, last, is_run.long(), part.long()], dim=1).tolist()
    ragged_row = layout.n_q - 1 if layout.q_len % layout.block_q else -1
    runs: dict[tuple[int, int, int, bool], list[int]] = {}
    lists: dict[tuple[int, bool, int, bool], list[int]] = {}
    for p, (count, lo, hi, run, parts) in enumerate(table):
        if run:
            runs.setdefault((lo, hi + 1, parts, p == ragged_row), []).append(p)
        else:
            lists.setdefault((count, count > 0 and hi == ragged, parts, p == ragged_row), []).append(p)
    for (lo, stop, parts, short), rows in list(runs.items()):
        if len(rows) == 1 and stop - lo < SHORT_RUN and not complete[rows[0]]:
            del runs[lo, stop, parts, short]
            lists.setdefault((stop - lo, stop - 1 == ragged, parts, short), []).append(rows[0])
    found = [Group(rows, (lo, stop), None, False, parts) for (lo, stop, parts, _), rows in runs.items()]
    for (count, tail, parts, _), rows in lists.items():
        rows.sort()
        chosen = idx[torch.tensor(rows, device=idx.device), : count - tail]
        found.append(Group(rows, None, chosen, tail, parts))
    return found
