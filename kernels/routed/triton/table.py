"""Launch parameters of the routed-heads kernel, for launches and for the compile gate alike. Imports no triton."""

from __future__ import annotations

import torch
from torch import Tensor

from ...sparse.triton.table import HOPPER, LARGEST_D, Tile, padded, precision

__all__ = ["HOPPER", "Tile", "padded", "partial_keys", "precision", "tile_for", "unsupported"]

# (padded head size, bytes per element) -> tile. Chosen by the compile table, not by time (unmeasured): nothing spills,
# and the main loop loads asynchronously.
TABLE = {
    (16, 2): Tile(128, 64, 8, 3),
    (32, 2): Tile(128, 64, 8, 3),
    (64, 2): Tile(128, 64, 8, 3),
    (128, 2): Tile(128, 32, 8, 3),
    (256, 2): Tile(64, 32, 8, 2),
    (16, 4): Tile(32, 16, 4, 2),
    (32, 4): Tile(32, 16, 4, 2),
    (64, 4): Tile(32, 16, 4, 2),
    (128, 4): Tile(32, 16, 4, 2),  # the interpreter only
}


def tile_for(D: int, dtype: torch.dtype, masked: bool, major: int = 8) -> Tile:
    """The tile under a mask or without; ``major`` is that of the GPU's compute capability."""
    key, even = (padded(D), dtype.itemsize), padded(D) == D
    if major == 9 and even and key in HOPPER:
        return HOPPER[key]
    tile = TABLE[key]
    # The masks over the padding of D and over hidden keys take the registers of the third stage's addresses, and more.
    stages = tile.stages if even else min(tile.stages, 2)
    short = masked and dtype.itemsize == 2 and padded(D) > 64
    return Tile(tile.rows // 2 if short else tile.rows, tile.keys, tile.warps, stages)


def partial_keys(D: int, tile: Tile, masked: bool) -> int:
    """Keys of one step at the diagonal or under a mask, which take registers."""
    return min(tile.keys, 32 if padded(D) <= 64 and not masked else 16)


def unsupported(q: Tensor, k: Tensor) -> str | None:
    """What the kernel cannot do of a call, or None."""
    largest = LARGEST_D.get(q.element_size(), 0)
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"no kernel for {q.dtype}"
    if q.shape[-1] > largest:
        return f"head size {q.shape[-1]} in {q.dtype} needs more registers than there are"
    return None
