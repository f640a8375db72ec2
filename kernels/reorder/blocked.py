"""Reordering of tokens in plain torch: one indexed copy for each head that is not in the model's own order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..threads import for_each
from .orders import Grid, rows_on


def reorder_blocked(x: Tensor, codes: Sequence[int], grid: Grid, start: int, inverse: bool) -> Tensor:
    """See :func:`patchkit.kernels.reorder_heads`; one tensor."""
    heads, group = len(codes), len(codes) // x.shape[1]
    out = torch.empty(x.shape[0], heads, *x.shape[2:], dtype=x.dtype, device=x.device)
    stop = start + grid[0] * grid[1] * grid[2]

    def make_worker() -> Callable[[int], None]:
        return work

    def work(h: int) -> None:
        source, to = x[:, h // group], out[:, h]
        if codes[h] == 0:
            to.copy_(source)
            return
        to[:, :start], to[:, stop:] = source[:, :start], source[:, stop:]
        rows = rows_on(codes[h], grid, x.device)
        if inverse:
            to[:, start:stop].index_copy_(1, rows, source[:, start:stop])
        else:
            to[:, start:stop] = source[:, start:stop].index_select(1, rows)

    for_each(range(heads), make_worker, x.device)
    return out
