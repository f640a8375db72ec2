"""Which implementation a call takes, and why. Names are honest: a dense computation is called dense."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..layout import BlockLayout

# Measured on a CPU with AVX2 against torch's flash kernel (benchmarks/block_sparse_cpu.py): a kept block costs about
# 1 / 0.75 of a block of a dense call. From 2,048 tokens every measured setting gains; at 1,108 tokens with D = 32
# (benchmarks/adaspa_video.py) a call at density 0.25 or more took longer than the dense one.
# A dense call under an expanded mask is no alternative: it took 1.6 to 2.9 times as long as without a mask.
PAYS_BELOW_DENSITY = 0.75
PAYS_FROM_PAIRS = 2048 * 2048


class Path(NamedTuple):
    """The implementation a call takes.

    Args:
        name: "dense" (the layout drops nothing) or "blocked" (gathered key blocks, plain torch).
        reason: why, in words.
        pays: whether the call is expected to be faster than dense attention over all keys. Dropping nothing instead is
            a different result, so that choice is the caller's.
    """

    name: str
    reason: str
    pays: bool


def choose_path(
    layout: BlockLayout, D: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Path:
    """Path that ``block_sparse_attention`` takes for this layout and these inputs. Reads the row counts only."""
    if keeps_everything(layout):
        return Path("dense", "the layout keeps every block of every row", False)
    density = layout.density()
    what = f"{density:.2f} of the blocks of {layout.q_len} x {layout.kv_len} tokens, D = {D}, {dtype} on {device}"
    if layout.q_len * layout.kv_len < PAYS_FROM_PAIRS:
        return Path("blocked", f"{what}: too short to gain over dense", False)
    if density > PAYS_BELOW_DENSITY:
        return Path("blocked", f"{what}: too dense to gain over dense", False)
    return Path("blocked", what, True)


def keeps_everything(layout: BlockLayout) -> bool:
    """True when every row is complete and no element rule applies."""
    if layout.part_num is not None:
        return False
    if layout.kv_lens is not None and int(layout.kv_lens.min()) == 0:
        return False
    return bool((layout.kv_num == layout.valid_blocks).all())
