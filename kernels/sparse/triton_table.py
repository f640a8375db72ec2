"""Launch parameters of the Triton kernels, for launches and for the compile gate alike. Imports no triton."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..layout import BlockLayout

LARGEST_D = 128


class Tile(NamedTuple):
    """Query rows and keys of one step, warps and pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int


# (padded head size, bytes per element) -> the largest tile. Chosen by the compile table, not by time (unmeasured):
# nothing spills, the main loop loads asynchronously, and two programs of 64 rows fit the shared memory of an sm120.
TABLE = {
    (16, 2): Tile(128, 64, 8, 3),
    (32, 2): Tile(128, 64, 8, 3),
    (64, 2): Tile(128, 64, 8, 3),
    (128, 2): Tile(128, 32, 8, 3),
    (16, 4): Tile(64, 32, 4, 2),
    (32, 4): Tile(64, 32, 4, 2),
    (64, 4): Tile(64, 32, 4, 2),
    (128, 4): Tile(64, 32, 4, 2),
}


def padded(D: int) -> int:
    """The power of two that a head size is padded to: at least 16, the shortest side of a tensor-core product."""
    return max(16, 1 << (D - 1).bit_length())


def tile_of(d_pad: int, dtype: torch.dtype, block_q: int, block_k: int) -> Tile:
    """The tile for these blocks: a block larger than the table's tile is walked in several, a smaller one as it is."""
    rows, keys, warps, stages = TABLE[d_pad, dtype.itemsize]
    rows, keys = min(rows, block_q), min(keys, block_k)
    # A warp holds 16 rows of a product; more of them would compute the same rows twice.
    return Tile(rows, keys, min(warps, max(1, rows // 16)), stages)


def constants_of(layout: BlockLayout, D: int, dtype: torch.dtype, device: str, tile: Tile) -> dict[str, Any]:
    """Compile-time arguments of the forward kernel."""
    return {
        "D": D,
        "D_PAD": padded(D),
        "BLOCK_Q": layout.block_q,
        "BLOCK_K": layout.block_k,
        "BM": tile.rows,
        "BN": tile.keys,
        "BP": min(tile.keys, 64),
        "PARTIAL": layout.part_idx is not None,
        "CAUSAL": layout.causal_offset is not None,
        "SEGMENTS": layout.q_seg is not None,
        "BITS": layout.part_bits is not None,
        "LENGTHS": layout.kv_lens is not None,
        "PRECISION": precision(dtype, device),
    }


def precision(dtype: torch.dtype, device: str) -> str:
    """How fp32 is multiplied. Three TF32 products keep nearly all of its bits; AMD and the interpreter have no TF32."""
    exact = dtype == torch.float32 and (device != "cuda" or torch.version.hip is not None)
    return "ieee" if exact else "tf32x3"
