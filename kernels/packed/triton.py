"""Launching the packed-attention kernels: tiles and splits."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..gpu import launching
from ..runs import Packed
from .triton_decode import decode_kernel, merge_kernel
from .triton_kernels import prefill_kernel

LOG2E = 1.4426950408889634
TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
LARGEST_HEAD = {2: 256, 4: 64}  # by bytes per number: the three TF32 products of fp32 take more registers
SHORTEST_CHUNK = 32  # tiles of 16 rows spill in some forms
FEW = 64  # rows of a group's heads and queries that decode in one tile
SPLIT_KEYS = 256  # keys that a split has at least
WAVES = 2  # programs a multiprocessor gets at least, where there are keys enough to split


class Tile(NamedTuple):
    """Query rows and keys of a step, warps, pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int


# (padded head size, bytes per number) -> tile of the prefill. Chosen by the compile table, not by time (unmeasured).
PREFILL = {
    (16, 2): Tile(128, 64, 8, 3),
    (32, 2): Tile(128, 64, 8, 3),
    (64, 2): Tile(128, 64, 8, 3),
    (128, 2): Tile(128, 32, 8, 3),
    (256, 2): Tile(64, 32, 8, 2),
    (16, 4): Tile(64, 16, 4, 2),
    (32, 4): Tile(64, 16, 4, 2),
    (64, 4): Tile(64, 16, 4, 2),
}


def padded(D: int) -> int:
    """The power of two that a head size is padded to: at least 16, the shortest side of a tensor-core product."""
    return max(16, triton.next_power_of_2(D))


def prefill_tile(D: int, bytes_per: int, chunk: int) -> Tile:
    """Tile of the prefill; a chunk smaller than the table's tile is one."""
    tile = PREFILL[padded(D), bytes_per]
    rows = min(tile.rows, chunk)
    keys = tile.keys if rows == tile.rows else min(tile.keys, 32)  # fewer warps hold less of the logits
    # The mask over the padding of D takes the registers of the third stage's addresses.
    stages = tile.stages if padded(D) == D else min(tile.stages, 2)
    # A warp holds 16 rows of a product; for a few rows four warps share its columns, and with them the accumulator.
    return Tile(rows, keys, min(tile.warps, max(4, rows // (8 if padded(D) > 128 else 16))), stages)


def decode_tile(D: int, bytes_per: int, rows: int) -> Tile:
    """Tile of the decoding: as many rows as a group has, and long steps, since it waits for memory."""
    rows = max(16, triton.next_power_of_2(rows))
    wide = padded(D) > 128
    if bytes_per == 4:
        return Tile(rows, 32 if rows <= 32 else 16, 4, 2)
    return Tile(rows, 32 if wide or rows > 32 else 64, 4 if rows <= 32 or not wide else 8, 2 if wide else 3)


def partial_keys(D: int, tile: Tile) -> int:
    """Keys of a step at the diagonal or at a ragged end: its masks take registers."""
    return min(tile.keys, 32 if padded(D) <= 64 else 16)


def decodes(q: Tensor, k: Tensor, blocks: int) -> bool:
    """Whether all heads of a group, with all queries, fit one tile: then the keys are split instead of the queries."""
    return blocks == 1 and q.shape[1] // k.shape[1] * q.shape[2] <= FEW


def unsupported(q: Tensor, k: Tensor, chunk: int, blocks: int) -> str | None:
    """What these kernels cannot do of a call, or None."""
    if q.dtype not in TYPES:
        return f"no kernel for {q.dtype}"
    if q.shape[-1] > LARGEST_HEAD[q.element_size()]:
        return f"head size {q.shape[-1]} in {q.dtype} needs more registers than there are"
    if not decodes(q, k, blocks) and (chunk < SHORTEST_CHUNK or chunk & (chunk - 1)):
        return f"chunks of {chunk} are not powers of two from {SHORTEST_CHUNK}"
    return None


def packed_attention_triton(
    q: Tensor,
    packed: Packed,
    used: Tensor,
    k: Tensor,
    v: Tensor,
    exact_from: Sequence[int],
    chunk: int,
    first: int,
    scale: float,
) -> Tensor:
    """See :func:`patchkit.kernels.packed_attention`."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    packed = Packed(*(x.contiguous() for x in packed))
    used = used.contiguous()
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device)
    with launching(q.device):
        if decodes(q, k, len(exact_from)):
            _decode(q, packed, used, k, v, exact_from[0] - (first + q.shape[2] - k.shape[2]), scale, out)
        else:
            _prefill(q, packed, used, k, v, exact_from, chunk, first, scale, out)
    return out


def _prefill(
    q: Tensor,
    packed: Packed,
    used: Tensor,
    k: Tensor,
    v: Tensor,
    exact_from: Sequence[int],
    chunk: int,
    first: int,
    scale: float,
    out: Tensor,
) -> None:
    B, H, L, D = q.shape
    tile = prefill_tile(D, q.element_size(), chunk)
    starts = torch.tensor(list(exact_from), dtype=torch.int32).to(q.device, non_blocking=True)
    prefill_kernel[(len(exact_from) * (chunk // tile.rows), B * H)](
        q,
        packed.keys,
        packed.values,
        packed.counts,
        used,
        k,
        v,
        starts,
        out,
        *_strides(q, packed, k, v),
        *out.stride()[:3],
        used.stride(0),
        k.shape[1],
        H // k.shape[1],
        L,
        first + L - k.shape[2],
        first,
        scale * LOG2E,
        D=D,
        D_PAD=padded(D),
        CHUNK=chunk,
        BM=tile.rows,
        BN=tile.keys,
        BP=partial_keys(D, tile),
        PRECISION=_precision(q),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _decode(q: Tensor, packed: Packed, used: Tensor, k: Tensor, v: Tensor, low: int, scale: float, out: Tensor) -> None:
    B, H, L, D = q.shape
    Hkv = k.shape[1]
    group = H // Hkv
    tile = decode_tile(D, q.element_size(), group * L)
    splits = _splits(packed.counts.shape[2] + k.shape[2] - low, B * Hkv, q.device)
    part = torch.empty(splits, B * Hkv, tile.rows, padded(D), dtype=torch.float32, device=q.device)
    lse = torch.empty(splits, B * Hkv, tile.rows, dtype=torch.float32, device=q.device)
    decode_kernel[(splits, B * Hkv)](
        q,
        packed.keys,
        packed.values,
        packed.counts,
        used,
        k,
        v,
        part,
        lse,
        *_strides(q, packed, k, v),
        Hkv,
        group,
        L,
        low,
        k.shape[2],
        splits,
        scale * LOG2E,
        D=D,
        D_PAD=padded(D),
        BM=tile.rows,
        BN=tile.keys,
        BP=partial_keys(D, tile),
        PRECISION=_precision(q),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    merge_kernel[(B * H * L,)](
        part,
        lse,
        out,
        *out.stride()[:3],
        Hkv,
        group,
        L,
        splits,
        B * Hkv,
        D=D,
        D_PAD=padded(D),
        BM=tile.rows,
        num_warps=1 if D <= 128 else 2,
        num_stages=1,
    )


def _strides(q: Tensor, packed: Packed, k: Tensor, v: Tensor) -> tuple[int, ...]:
    whole = (*q.stride()[:3], *packed.keys.stride()[:3], *packed.values.stride()[:3], *packed.counts.stride()[:2])
    return (*whole, *k.stride()[:3], *v.stride()[:3])


def _splits(keys: int, items: int, device: torch.device) -> int:
    """Into how many parts the keys are cut: enough programs for the card, none with next to nothing to do."""
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    return max(1, min(WAVES * multiprocessors // items, keys // SPLIT_KEYS))


def _precision(x: Tensor) -> str:
    """How fp32 is multiplied: three TF32 products on NVIDIA; AMD and the interpreter have plain fp32."""
    return "tf32x3" if x.device.type == "cuda" and torch.version.hip is None else "ieee"
