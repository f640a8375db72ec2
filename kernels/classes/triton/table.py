"""Launch parameters of the decoding kernels, for launches and for the compile gate alike. Imports no triton."""

from __future__ import annotations

from typing import NamedTuple

import torch

# Bytes per element -> the largest head size.
LARGEST_D = {2: 256, 4: 64}  # fp32 of 128 spills


def most_rows(wide: int) -> int:
    """Rows of a tile that the registers hold beside a head of ``wide`` (padded); 32 are 8 query heads of 4 classes."""
    return 32 if wide <= 128 else 16


class Tile(NamedTuple):
    """Keys of one step, warps and pipeline stages."""

    keys: int
    warps: int
    stages: int


def padded(D: int) -> int:
    """The power of two that a head size is padded to."""
    return max(16, 1 << (D - 1).bit_length())


def rows_of(group: int, count: int) -> int:
    """Rows of a tile for so many query heads a KV head and classes; at least a tensor-core product's."""
    return max(16, 1 << (group * count - 1).bit_length())


def tile_of(wide: int, size: int, rows: int) -> Tile:
    """By padded head size, bytes per element and rows. Chosen by the compile table, not by time (unmeasured)."""
    if size == 4:
        return Tile(32, 4, 2)
    if wide > 128:
        return Tile(32, 4, 2)
    return Tile(64, 4, 3)


def precision(dtype: torch.dtype, device: str) -> str:
    """How fp32 is multiplied: three TF32 products on NVIDIA; AMD and the interpreter have plain fp32."""
    exact = dtype == torch.float32 and (device != "cuda" or torch.version.hip is not None)
    return "ieee" if exact else "tf32x3"
