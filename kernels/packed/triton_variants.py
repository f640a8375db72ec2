"""The forms of the packed-attention kernels that the compile gate goes through."""

from __future__ import annotations

from typing import Any

import torch

from ..gpu import Variant
from .triton import TYPES, Tile, decode_tile, padded, partial_keys, prefill_tile
from .triton_decode import decode_kernel, merge_kernel
from .triton_kernels import prefill_kernel


def variants() -> list[Variant]:
    """Every form of launch for the shapes that matter."""
    half, short, full = torch.float16, torch.bfloat16, torch.float32
    prefill = [(D, kind, 128) for D in (64, 128) for kind in (half, short)]
    prefill += [(D, kind, chunk) for D, kind in ((64, half), (128, short), (256, half)) for chunk in (32, 64)]
    prefill += [(80, short, 128), (256, short, 128)] + [(64, full, chunk) for chunk in (32, 64)]
    decode = [(D, kind, rows) for D, kind in ((64, short), (128, half)) for rows in (4, 24, 40)]
    decode += [(80, short, 8), (80, half, 40), (256, short, 4), (256, half, 40)]
    decode += [(64, full, rows) for rows in (4, 24, 40)]
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


def _constants(D: int, tile: Tile) -> dict[str, Any]:
    """Compile-time arguments on NVIDIA."""
    steps = {"BM": tile.rows, "BN": tile.keys, "BP": partial_keys(D, tile)}
    return {"D": D, "D_PAD": padded(D), "PRECISION": "tf32x3"} | steps


def _prefill_variant(D: int, dtype: torch.dtype, chunk: int) -> Variant:
    tile = prefill_tile(D, dtype.itemsize, chunk)
    types, loose = _types(prefill_kernel, dtype)
    constants = {
        "D": D,
        "D_PAD": padded(D),
        "CHUNK": chunk,
        "BM": tile.rows,
        "BN": tile.keys,
        "BP": partial_keys(D, tile),
        "PRECISION": "tf32x3",
    }
    name = f"packed prefill D{D} {TYPES[dtype][1:]} chunk {chunk}"
    return Variant(name, prefill_kernel, types, constants, tile.warps, tile.stages, loose=loose)


def _decode_variant(D: int, dtype: torch.dtype, rows: int) -> Variant:
    tile = decode_tile(D, dtype.itemsize, rows)
    types, loose = _types(decode_kernel, dtype)
    constants = {
        "D": D,
        "D_PAD": padded(D),
        "BM": tile.rows,
        "BN": tile.keys,
        "BP": partial_keys(D, tile),
        "PRECISION": "tf32x3",
    }
    name = f"packed decode D{D} {TYPES[dtype][1:]} rows {rows}"
    return Variant(name, decode_kernel, types, constants, tile.warps, tile.stages, loose=loose)


def _merge_variant(D: int, dtype: torch.dtype) -> Variant:
    types, loose = _types(merge_kernel, dtype)
    constants = {"D": D, "D_PAD": padded(D), "BM": 16}
    name = f"packed merge D{D} {TYPES[dtype][1:]}"
    return Variant(name, merge_kernel, types, constants, 1 if D <= 128 else 2, 1, pipelined=False, loose=loose)
