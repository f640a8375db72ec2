"""Which implementation a call takes, and why. Names are honest: a dense computation is called dense."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..layout import BlockLayout

# Below this many pairs per head the blocked path's cost per call (about 50 us each) outweighs the blocks it skips.
SHORT_PAIRS = 512 * 512


class Path(NamedTuple):
    """Implementation name ("dense", "masked_dense" or "blocked") and the reason it was chosen."""

    name: str
    reason: str


def choose_path(
    layout: BlockLayout, D: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Path:
    """Path that ``block_sparse_attention`` takes for this layout, head size, dtype and device.

    Cheap: reads the row counts only. "masked_dense" becomes "blocked" at run time if k or v hold NaN or infinities,
    because a masked dense call would let them leak.
    """
    if keeps_everything(layout):
        return Path("dense", "the layout keeps every block of every row")
    if layout.kv_lens is not None and int(layout.kv_lens.min()) == 0:
        return Path("blocked", "a sample has no valid key")
    pairs = layout.q_len * layout.kv_len
    if pairs <= SHORT_PAIRS:
        return Path("masked_dense", f"{layout.q_len} x {layout.kv_len} is too short for a loop over blocks to pay")
    return Path("blocked", f"{layout.density():.2f} of the blocks are computed, D = {D}, {dtype}, {device}")


def keeps_everything(layout: BlockLayout) -> bool:
    """True when every row is complete and no element rule applies."""
    if layout.part_num is not None:
        return False
    if layout.kv_lens is not None and int(layout.kv_lens.min()) == 0:
        return False
    return bool((layout.kv_num == layout.valid_blocks).all())
