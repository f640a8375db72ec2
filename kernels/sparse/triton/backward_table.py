"""Launch parameters of the backward kernels, for launches and for the compile gate alike. Imports no triton."""

from __future__ import annotations

from typing import Any

import torch

from ...layout import BlockLayout
from . import table
from .table import Tile

# (padded head size, bytes per element) -> the largest tiles of dq and of dk/dv. Chosen by the compile table, not by
# time (unmeasured): nothing spills, the main loop loads asynchronously, and it fits the shared memory of an sm120.
TABLE = {
    (16, 2): (Tile(64, 64, 4, 3), Tile(32, 64, 4, 3)),
    (32, 2): (Tile(64, 64, 4, 3), Tile(32, 64, 4, 3)),
    (64, 2): (Tile(64, 64, 4, 3), Tile(32, 64, 8, 3)),
    (128, 2): (Tile(64, 32, 4, 3), Tile(32, 64, 8, 3)),
    (256, 2): (Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    (16, 4): (Tile(32, 32, 4, 2), Tile(32, 32, 8, 2)),
    (32, 4): (Tile(32, 32, 4, 2), Tile(32, 32, 8, 2)),
    (64, 4): (Tile(32, 32, 4, 2), Tile(32, 32, 8, 2)),
    # dk/dv in fp32 at this head size spills (144 bytes a thread on sm90), in smaller tiles more. It is not in the gate.
    (128, 4): (Tile(16, 32, 4, 2), Tile(32, 32, 8, 2)),
}


def tiles_of(d_pad: int, dtype: torch.dtype, block_q: int, block_k: int) -> tuple[Tile, Tile]:
    """Tiles of dq and of dk/dv for these blocks: a larger block is walked in several tiles, a smaller one as it is."""
    found = []
    for for_keys, (rows, keys, warps, stages) in enumerate(TABLE[d_pad, dtype.itemsize]):
        rows, keys = min(rows, block_q), min(keys, block_k)
        # A warp computes 16 rows and 8 columns of a product at least; more warps would compute the same twice.
        m, n = (keys, rows) if for_keys else (rows, keys)
        fits = max(1, m // 16) * (min(n, d_pad) // 8)
        found.append(Tile(rows, keys, min(warps, fits), stages))
    return found[0], found[1]


def constants_of(layout: BlockLayout, D: int, dtype: torch.dtype, device: str, tile: Tile) -> dict[str, Any]:
    """Compile-time arguments that the dq and the dk/dv kernel share: those of the forward but for two."""
    found = table.constants_of(layout, D, dtype, device, tile, resume=False)
    del found["BP"], found["RESUME"]
    return found
