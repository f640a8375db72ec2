"""Launching the packed-attention kernels: tiles, splits, and the forms that the compile gate goes through."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..gpu import Variant, launching
from ..runs import Packed
from .triton_decode import decode_kernel, merge_kernel
from .triton_kernels import prefill_kernel

LOG2E = 1.4426950408889634
TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
LARGEST_HEAD = {2: 256, 4: 64}  # by bytes per number: the three TF32 products of fp32 take more registers
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
    # The mask over the padding of D takes the registers of the third stage's addresses.
    stages = tile.stages if padded(D) == D else min(tile.stages, 2)
    return Tile(rows, tile.keys, min(tile.warps, max(1, rows // 16) * (2 if padded(D) > 128 else 1)), stages)


def decode_tile(D: int, bytes_per: int, rows: int) -> Tile:
    """Tile of the decoding: as many rows as a group has, and long steps, since it waits for memory."""
    rows = max(16, triton.next_power_of_2(rows))
    wide = padded(D) > 128
    if bytes_per == 4:
        return Tile(rows, 16, 4, 2)
    return Tile(rows, 32 if wide or rows > 32 else 64, 4 if rows <= 32 or not wide else 8, 2 if wide else 3)


def unsupported(q: Tensor, v: Tensor, chunk: int) -> str | None:
    """What these kernels cannot do of a call, or None."""
    if q.dtype not in TYPES:
        return f"no kernel for {q.dtype}"
    if q.shape[-1] > LARGEST_HEAD[q.element_size()]:
        return f"head size {q.shape[-1]} in {q.dtype} needs more registers than there are"
    if chunk < 16 or chunk & (chunk - 1):
        return f"chunks of {chunk} are not powers of two from 16"
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
        if len(exact_from) == 1 and q.shape[1] // k.shape[1] * q.shape[2] <= FEW:
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


def variants() -> list[Variant]:
    """Every form of launch for the shapes that matter."""
    prefill = [
        (64, torch.bfloat16, 128),
        (64, torch.float16, 32),
        (80, torch.bfloat16, 128),
        (128, torch.bfloat16, 128),
        (256, torch.bfloat16, 128),
        (64, torch.float32, 128),
    ]
    decode = [
        (64, torch.bfloat16, 4),
        (128, torch.float16, 40),
        (80, torch.bfloat16, 8),
        (256, torch.bfloat16, 4),
        (64, torch.float32, 4),
    ]
    merge = [(80, torch.float16), (256, torch.bfloat16)]
    found = [_prefill_variant(*form) for form in prefill] + [_decode_variant(*form) for form in decode]
    return found + [_merge_variant(*form) for form in merge]


def _types(kernel: Any, dtype: torch.dtype) -> tuple[dict[str, str], frozenset[str]]:
    """Types of all run-time arguments, and which of them need not be multiples of 16."""
    types: dict[str, str] = {}
    for name in kernel.arg_names:
        if name in ("part_ptr", "lse_ptr"):
            types[name] = "*fp32"
        elif name in ("count_ptr", "used_ptr", "from_ptr"):
            types[name] = "*i32"
        elif name.endswith("_ptr"):
            types[name] = TYPES[dtype]
        elif name == "scale2":
            types[name] = "fp32"
        elif not name.isupper():
            types[name] = "i32"
    loose = {n for n in types if types[n] == "i32" and n.rpartition("_")[2] not in ("b", "h", "n")}
    # Counts of a head may begin anywhere: their number differs from call to call.
    return types, frozenset(loose | {"c_b", "c_h", "used_s"})


def _prefill_variant(D: int, dtype: torch.dtype, chunk: int) -> Variant:
    tile = prefill_tile(D, dtype.itemsize, chunk)
    types, loose = _types(prefill_kernel, dtype)
    constants = {"D": D, "D_PAD": padded(D), "CHUNK": chunk, "BM": tile.rows, "BN": tile.keys, "PRECISION": "tf32x3"}
    name = f"packed prefill D{D} {TYPES[dtype][1:]} chunk {chunk}"
    return Variant(name, prefill_kernel, types, constants, tile.warps, tile.stages, loose=loose)


def _decode_variant(D: int, dtype: torch.dtype, rows: int) -> Variant:
    tile = decode_tile(D, dtype.itemsize, rows)
    types, loose = _types(decode_kernel, dtype)
    constants = {"D": D, "D_PAD": padded(D), "BM": tile.rows, "BN": tile.keys, "PRECISION": "tf32x3"}
    name = f"packed decode D{D} {TYPES[dtype][1:]} rows {rows}"
    return Variant(name, decode_kernel, types, constants, tile.warps, tile.stages, loose=loose)


def _merge_variant(D: int, dtype: torch.dtype) -> Variant:
    types, loose = _types(merge_kernel, dtype)
    constants = {"D": D, "D_PAD": padded(D), "BM": 16}
    name = f"packed merge D{D} {TYPES[dtype][1:]}"
    return Variant(name, merge_kernel, types, constants, 1 if D <= 128 else 2, 1, pipelined=False, loose=loose)
