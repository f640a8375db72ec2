"""Launch parameters of the backward kernels, for launches and for the compile gate alike. Imports no triton."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..layout import BlockLayout

LARGEST_D = 128
SMALLEST_BLOCK = 16


class Tile(NamedTuple):
    """Query rows and keys of one step, warps and pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int


# (padded head size, bytes per element) -> the largest tiles of dq and of dk/dv. Chosen by the compile table, not by
# time (unmeasured): nothing spills, the main loop loads asynchronously, and it fits the shared memory of an sm120.
TABLE = {
    (16, 2): (Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
    (32, 2): (Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
    (64, 2): (Tile(64, 64, 4, 3), Tile(64, 64, 8, 3)),
    (128, 2): (Tile(64, 32, 4, 3), Tile(32, 64, 8, 3)),
    (16, 4): (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    (32, 4): (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    (64, 4): (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    (128, 4): (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
}


def padded(D: int) -> int:
    """The power of two that a head size is padded to: at least 16, the shortest side of a tensor-core product."""
    return max(16, 1 << (D - 1).bit_length())


def refusal(layout: BlockLayout, D: int, dtype: torch.dtype) -> str | None:
    """Why the Triton backward does not take these sizes; None when it does."""
    if D > LARGEST_D:
        return f"head size {D}; the Triton backward takes up to {LARGEST_D}"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"no Triton backward for {dtype}"
    for name, size in (("block_q", layout.block_q), ("block_k", layout.block_k)):
        if size < SMALLEST_BLOCK or size & (size - 1):
            return f"{name} {size} is not a power of two from {SMALLEST_BLOCK}"
    return None


def tiles_of(d_pad: int, dtype: torch.dtype, block_q: int, block_k: int) -> tuple[Tile, Tile]:
    """Tiles of dq and of dk/dv for these blocks: a larger block is walked in several tiles, a smaller one as it is."""
    found = []
    for held, (rows, keys, warps, stages) in enumerate(TABLE[d_pad, dtype.itemsize]):
        rows, keys = min(rows, block_q), min(keys, block_k)
        # A warp holds 16 rows of a product (of queries for dq, of keys for dk/dv) and 8 columns at least.
        fits = max(1, (keys if held else rows) // 16) * max(1, min(rows, keys, d_pad) // 16)
        found.append(Tile(rows, keys, min(warps, fits), stages))
    return found[0], found[1]


def constants_of(layout: BlockLayout, D: int, dtype: torch.dtype, device: str, tile: Tile) -> dict[str, Any]:
    """Compile-time arguments that the dq and the dk/dv kernel share."""
    return {
        "D": D,
        "D_PAD": padded(D),
        "BLOCK_Q": layout.block_q,
        "BLOCK_K": layout.block_k,
        "BM": tile.rows,
        "BN": tile.keys,
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
