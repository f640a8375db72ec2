"""Launch parameters of the Triton kernels, for launches and for the compile gate alike. Imports no triton."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ...layout import BlockLayout

# Bytes per element -> the largest head size. The three TF32 products of fp32 do not fit the registers above 64.
LARGEST_D = {2: 256, 4: 64}


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
    (256, 2): Tile(64, 32, 8, 2),
    (16, 4): Tile(64, 16, 4, 2),
    (32, 4): Tile(64, 16, 4, 2),
    (64, 4): Tile(64, 16, 4, 2),
    (128, 4): Tile(64, 16, 4, 2),  # the interpreter only
}
# Where a generation has a form of its own. Hopper's products want 64 keys at once and its shared memory has room for a
# third stage; elsewhere 64 keys beside 128 rows of D = 128 spill.
HOPPER = {(128, 2): Tile(128, 64, 8, 3)}


def padded(D: int) -> int:
    """The power of two that a head size is padded to: at least 16, the shortest side of a tensor-core product."""
    return max(16, 1 << (D - 1).bit_length())


def tile_of(D: int, dtype: torch.dtype, block_q: int, block_k: int, major: int = 8) -> Tile:
    """The tile for these blocks: a block larger than the table's tile is walked in several, a smaller one as it is.

    ``major`` is that of the GPU's compute capability.
    """
    key = padded(D), dtype.itemsize
    even = padded(D) == D
    rows, keys, warps, stages = HOPPER[key] if major == 9 and even and key in HOPPER else TABLE[key]
    # The mask over the padding of D takes the registers of the third stage's addresses.
    stages = stages if even else min(stages, 2)
    rows, keys = min(rows, block_q), min(keys, block_k)
    # A warp holds 16 rows of a product. Twice as many share its columns, which the accumulator of D = 256 needs.
    return Tile(rows, keys, min(warps, max(1, rows // 16) * (2 if key[0] > 128 else 1)), stages)


def partial_keys(D: int, tile: Tile) -> int:
    """Keys of one step over partial blocks: the element masks take registers."""
    return min(tile.keys, 32 if padded(D) <= 128 else 16)


def constants_of(
    layout: BlockLayout, D: int, dtype: torch.dtype, device: str, tile: Tile, resume: bool
) -> dict[str, Any]:
    """Compile-time arguments of the forward kernel."""
    return {
        "D": D,
        "D_PAD": padded(D),
        "BLOCK_Q": layout.block_q,
        "BLOCK_K": layout.block_k,
        "BM": tile.rows,
        "BN": tile.keys,
        "BP": partial_keys(D, tile),
        "RESUME": resume,
        "PARTIAL": layout.part_idx is not None,
        "CAUSAL": layout.causal_offset is not None,
        "SEGMENTS": layout.q_seg is not None,
        "BITS": layout.part_bits is not None,
        "LENGTHS": layout.kv_lens is not None,
        "PRECISION": precision(dtype, device),
    }


def major_of(device: torch.device) -> int:
    """Major compute capability of a GPU; Ampere's for the interpreter."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8


def precision(dtype: torch.dtype, device: str) -> str:
    """How fp32 is multiplied. Three TF32 products keep nearly all of its bits; AMD and the interpreter have no TF32."""
    exact = dtype == torch.float32 and (device != "cuda" or torch.version.hip is not None)
    return "ieee" if exact else "tf32x3"
