"""The active query rows of each KV head, in the order of what they see, and the pieces they are computed in."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .sight import Sight


class Piece(NamedTuple):
    """Rows start..stop of a list, whose first sees ``first`` keys and whose last ``last``."""

    start: int
    stop: int
    first: int
    last: int


class Rows(NamedTuple):
    """Active (token, head) pairs of one KV head of one sample, by rising number of keys.

    Args:
        kv_head: its number.
        tokens: (R,) int64.
        heads: (R,) int64, numbers of query heads.
        ends: (R,) int64, keys that each sees, at least 1.
    """

    kv_head: int
    tokens: Tensor
    heads: Tensor
    ends: Tensor

    def pieces(self, size: int) -> list[Piece]:
        """These rows in pieces of ``size``. Reads the ends at their borders."""
        count = len(self.tokens)
        starts = list(range(0, count, size))
        stops = [min(count, a + size) for a in starts]
        borders = self.ends[torch.tensor([starts, [b - 1 for b in stops]], device=self.ends.device)].tolist()
        return [Piece(*piece) for piece in zip(starts, stops, *borders, strict=True)]


def rows_of(active: Tensor, kv_heads: int, sight: Sight) -> list[Rows]:
    """Rows of one sample, one entry for each KV head that has any.

    Args:
        active: (H, N) bool.
        kv_heads: G, which divides H.
        sight: what the rows of this sample see; rows that see nothing are left out.
    """
    heads, n = active.shape
    group = heads // kv_heads
    ends, order = sight.ends, None
    active = active & (ends > 0)
    if bool((ends.diff() < 0).any()):
        ends, order = torch.sort(ends, stable=True)
        active = active[:, order]
    table = active.view(kv_heads, group, n).transpose(1, 2)
    kv, place, member = table.nonzero(as_tuple=True)
    counts = table.sum((1, 2)).tolist()
    tokens = place if order is None else order[place]
    parts = zip(tokens.split(counts), (kv * group + member).split(counts), ends[place].split(counts), strict=True)
    return [Rows(j, *part) for j, part in enumerate(parts) if counts[j]]


def gather(x: Tensor, heads: Tensor, tokens: Tensor) -> Tensor:
    """Rows (R, D) of (H, N, D), or numbers (R,) of (H, N); whole rows are copied, of either order of the memory."""
    count, n = x.shape[:2]
    if x.stride(1) == count * x.stride(0) and count > 1:
        return x.transpose(0, 1).reshape(n * count, *x.shape[2:]).index_select(0, tokens * count + heads)
    return x.reshape(count * n, *x.shape[2:]).index_select(0, heads * n + tokens)
