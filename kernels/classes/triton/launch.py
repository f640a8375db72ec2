"""From tensors to the decoding kernels."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...gpu import launching
from ..parts import Accumulated
from .decode import join_kernel, split_kernel
from .table import LARGEST_D, Tile, most_rows, padded, precision, rows_of, tile_of

WAVES = 2  # programs a multiprocessor
SPLIT_KEYS = 256  # at least, so that joining costs little
MOST_SPLITS = 64
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Splits(NamedTuple):
    """What the first kernel wrote, for the second: fp32, rows as in :mod:`.decode`.

    Attributes:
        top, sums: (B, Hkv, splits, rows).
        values: (B, Hkv, splits, rows, D padded).
    """

    top: Tensor
    sums: Tensor
    values: Tensor

    @property
    def splits(self) -> int:
        """How many splits."""
        return self.top.shape[2]

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        return self.top.shape[3]


def unsupported(q: Tensor, k: Tensor, v: Tensor, count: int) -> str | None:
    """What these kernels cannot do of a call, or None."""
    if q.shape[2] != 1:
        return "several queries"
    if q.dtype not in DTYPES:
        return f"no kernel for {q.dtype}"
    if q.shape[-1] > LARGEST_D[q.element_size()]:
        return f"head size {q.shape[-1]} in {q.dtype} needs more registers than there are"
    if rows_of(q.shape[1] // k.shape[1], count) > most_rows(padded(q.shape[-1])):
        return f"{q.shape[1] // k.shape[1]} query heads a KV head"
    if 1 not in (q.stride(-1), q.shape[-1]) or k.stride(-1) != 1 or v.stride(-1) != 1:
        return "head vectors are not contiguous"
    return None


def splits_for(batch_heads: int, keys: int, tile: Tile, device: torch.device) -> int:
    """Parts the keys are cut into, so that the programs fill the GPU."""
    most = max(1, min(MOST_SPLITS, keys // max(SPLIT_KEYS, tile.keys)))
    if device.type != "cuda":
        return most
    wanted = WAVES * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(most, wanted // max(1, batch_heads)))


def run_splits(
    q: Tensor, k: Tensor, v: Tensor, classes: Tensor, count: int, scale: float, softcap: float | None
) -> Splits:
    """Launch the first kernel. q (B, H, 1, D)."""
    B, H, _, D = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    rows, wide = rows_of(H // kv_heads, count), padded(D)
    tile = tile_of(wide, q.element_size(), rows)
    splits = splits_for(B * kv_heads, keys, tile, q.device)
    length = -(-keys // (splits * tile.keys)) * tile.keys
    splits = -(-keys // length)
    classes = classes.contiguous()
    made = Splits(
        q.new_empty((B, kv_heads, splits, rows), dtype=torch.float32),
        q.new_empty((B, kv_heads, splits, rows), dtype=torch.float32),
        q.new_empty((B, kv_heads, splits, rows, wide), dtype=torch.float32),
    )
    numbers = (scale * math.log2(math.e), 0.0) if softcap is None else (scale / softcap, softcap * math.log2(math.e))
    with launching(q.device):
        split_kernel[(B * kv_heads * splits,)](
            *(q, k, v, classes, *made, *q.stride()[:2], *k.stride()[:3], *v.stride()[:3]),
            classes.stride(0) if classes.shape[0] > 1 else 0,
            *(kv_heads, keys, length, splits, *numbers),
            GROUP=H // kv_heads,
            C=count,
            ROWS=rows,
            D=D,
            D_PAD=wide,
            BN=tile.keys,
            SOFTCAP=softcap is not None,
            PRECISION=precision(q.dtype, q.device.type),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return made


def class_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, classes: Tensor, count: int, scale: float, softcap: float | None
) -> Accumulated:
    """See :func:`patchkit.kernels.class_attention`; q (B, H, 1, D), no mask but :data:`HIDDEN` keys, no boost."""
    B, H, _, D = q.shape
    made = run_splits(q, k, v, classes, count, scale, softcap)
    top = q.new_empty((B, H, 1), dtype=torch.float32)
    sums = q.new_empty((B, H, 1, count), dtype=torch.float32)
    values = q.new_empty((B, H, 1, count, D), dtype=torch.float32)
    with launching(q.device):
        join_kernel[(B * H, count)](
            *(*made, top, sums, values, H, H // k.shape[1], made.splits),
            C=count,
            ROWS=made.rows,
            S_PAD=1 << (made.splits - 1).bit_length(),
            D=D,
            D_PAD=padded(D),
            num_warps=4,
        )
    return Accumulated(top, sums, values)
