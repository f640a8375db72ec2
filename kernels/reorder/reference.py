"""Reordering of tokens exactly as the definition reads: view, permute, flatten, head by head."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .orders import ORDERS, Grid


def reorder_reference(x: Tensor, codes: Sequence[int], grid: Grid, start: int = 0, inverse: bool = False) -> Tensor:
    """x (B, Hkv, N, D) with the tokens start .. start + F*H*W of query head h in order ``codes[h]``: (B, H, N, D).

    Query head h reads head h // (H / Hkv). With ``inverse``, tokens go back to where they came from.
    """
    group = len(codes) // x.shape[1]
    out = x.repeat_interleave(group, 1).clone()
    stop = start + grid[0] * grid[1] * grid[2]
    for h, code in enumerate(codes):
        axes = ORDERS[code]
        image = out[:, h, start:stop].clone()
        if inverse:
            shape = tuple(grid[a] for a in axes)
            back = tuple(axes.index(a) for a in range(3))
            image = image.unflatten(1, shape).permute(0, *(1 + a for a in back), 4).flatten(1, 3)
        else:
            image = image.unflatten(1, grid).permute(0, *(1 + a for a in axes), 4).flatten(1, 3)
        out[:, h, start:stop] = image
    return out
