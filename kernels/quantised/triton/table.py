"""Launch parameters of quantised attention, for launches and for the compile gate alike. Imports no triton."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...layout import BlockLayout
from ..formats import K_GROUP, Format

LARGEST_D = {2: 128, 4: 64}
FP8_FROM = (8, 9)


class Tile(NamedTuple):
    """Query rows and keys of one step, warps and pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int


def padded(D: int) -> int:
    """The power of two that a head size is padded to: an 8-bit product needs 32."""
    return max(32, 1 << (D - 1).bit_length())


def tile_of(D: int, bytes_per: int, block_q: int, block_k: int, pv: str) -> Tile:
    """The tile for these blocks. Chosen by the compile table, not by time (unmeasured): nothing spills."""
    wide = padded(D) > 64
    rows = min(block_q, 64 if wide or pv != "none" or bytes_per == 4 else 128)
    if pv == "none" and wide and bytes_per == 2:
        rows = min(block_q, 128)
    warps = max(1, rows // 16)
    if wide and pv != "none":
        warps *= 2
    # of two stages instead of three, D = 64 in 16-bit values keeps all registers
    stages = 2 if bytes_per == 4 or (pv == "none" and not wide and rows == 64) else 3
    return Tile(rows, min(block_k, K_GROUP), warps, stages)


def unsupported(q: Tensor, layout: BlockLayout, form: Format) -> str | None:
    """What the kernels cannot do of a call, or None."""
    for name, size in (("block_q", layout.block_q), ("block_k", layout.block_k)):
        if size < 32 or size & (size - 1):
            return f"{name} is {size}, not a power of two from 32"
    if q.element_size() not in LARGEST_D or q.shape[-1] > LARGEST_D[q.element_size()]:
        return f"head size {q.shape[-1]} in {q.dtype}"
    if form.pv == "fp8" and q.device.type == "cuda" and torch.cuda.get_device_capability(q.device) < FP8_FROM:
        return "this GPU has no fp8 products"
    if form.p_scale == "static":
        return "a static scale of P is an ablation"
    return None
