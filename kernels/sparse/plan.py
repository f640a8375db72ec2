"""Which implementation a call takes, and why. Names are honest: a dense computation is called dense."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import gpu
from ..layout import BlockLayout
from .triton.table import LARGEST_D, tile_of

# Measured on a CPU with AVX2, two threads, against torch's flash kernel: (pairs of tokens, density up to which a call
# gains). Every measured call gained at 0.5 from 2,048 tokens on and at 0.3 from 1,108; at 0.6 one of eight lost, at
# 0.75 half of them.
# A dense call under an expanded mask is no alternative: it took 1.6 to 2.9 times as long as without a mask.
PAYS_BELOW_DENSITY = ((4096 * 4096, 0.55), (2048 * 2048, 0.5), (1024 * 1024, 0.4))

# The Triton kernel: unmeasured. The dense kernels it competes with are hand-tuned for each GPU generation; a Triton
# one is taken to reach 0.65 of their rate with 128 query rows a tile, 0.5 with 64 (each tile of keys is then read
# twice as often) and half of that for each further halving. Below 4,096 tokens a dense call is a matter of a few waves.
GPU_RETENTION = 0.65
GPU_RETENTION_64 = 0.5
GPU_PAYS_FROM_PAIRS = 4096 * 4096


class Path(NamedTuple):
    """The implementation a call takes.

    Args:
        name: "dense" (the layout drops nothing), "triton" (lists walked by a GPU kernel) or "blocked" (gathered key
            blocks, plain torch).
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
    """Path that ``block_sparse_attention`` takes for this layout and these inputs. Reads the row counts once."""
    if keeps_everything(layout):
        return Path("dense", "the layout keeps every block of every row", False)
    device = torch.device(device)
    density = layout.derived("density", layout.density)
    what = f"{density:.2f} of the blocks of {layout.q_len} x {layout.kv_len} tokens, D = {D}, {dtype} on {device}"
    missing = triton_obstacle(layout, D, dtype, device)
    name = "blocked" if missing else "triton"
    if missing and device.type != "cpu":
        what += f" (no Triton: {missing})"
    pairs = layout.q_len * layout.kv_len
    if missing:
        below = next((share for least, share in PAYS_BELOW_DENSITY if pairs >= least), 0.0)
    else:
        below = retention(layout, D, dtype) if pairs >= GPU_PAYS_FROM_PAIRS else 0.0
    if not below:
        return Path(name, f"{what}: too short to gain over dense", False)
    if density > below:
        return Path(name, f"{what}: too dense to gain over dense", False)
    return Path(name, what, True)


def triton_obstacle(layout: BlockLayout, D: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the Triton kernel does not take this call; None when it does. Reads no tensor."""
    missing = gpu.obstacle(device)
    if missing:
        return missing
    for name, size in (("block_q", layout.block_q), ("block_k", layout.block_k)):
        if size < 16 or size & (size - 1):
            return f"{name} is {size}, not a power of two from 16"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"{dtype} has no tensor-core product"
    if LARGEST_D[dtype.itemsize] < D:
        return f"D is {D}, more than {LARGEST_D[dtype.itemsize]} in {dtype}"
    return None


def retention(layout: BlockLayout, D: int, dtype: torch.dtype) -> float:
    """Share of the dense kernel's rate that the Triton kernel is taken to reach (unmeasured, see above)."""
    rows = tile_of(D, dtype, layout.block_q, layout.block_k).rows
    return GPU_RETENTION if rows >= 128 else GPU_RETENTION_64 * rows / 64


def keeps_everything(layout: BlockLayout) -> bool:
    """True when every row is complete and no element rule applies. Reads the row counts once."""
    return layout.derived("keeps everything", lambda: _keeps_everything(layout))


def _keeps_everything(layout: BlockLayout) -> bool:
    if layout.part_num is not None:
        return False
    if layout.kv_lens is not None and int(layout.kv_lens.min()) == 0:
        return False
    return bool((layout.kv_num == layout.valid_blocks).all())
