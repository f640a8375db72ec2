"""The compiled forms of the Triton kernels that the compile gate goes through; made from the launch table itself."""

from __future__ import annotations

from typing import Any

import torch

from ...gpu import Variant
from .forward import forward_kernel, merge_kernel
from .table import HOPPER, padded, partial_keys, tile_of

NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
FLAGS = ("RESUME", "PARTIAL", "CAUSAL", "SEGMENTS", "BITS", "LENGTHS")
# Run-time sizes that a real sequence rarely makes divisible by 16.
COUNTS = ("heads", "group", "n_q", "q_len", "kv_len", "causal_offset", "splits", "kv_width", "part_width")
LOOSE = frozenset({*COUNTS, "row_b", "row_h"})


def variants() -> list[Variant]:
    """Head sizes, dtypes, blocks and each structural flag, as :mod:`.launch` launches them."""
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    forms: list[tuple[int, torch.dtype, int, int, tuple[str, ...]]] = [
        *((D, dtype, 64, 64, ()) for D in (64, 128) for dtype in (half, brain)),
        *((D, brain, 64, 64, ("RESUME",)) for D in (64, 128)),
        *((D, brain, 128, 64, ()) for D in (64, 128)),
        (80, brain, 64, 64, ()),
        (256, half, 64, 64, ()),
        (256, brain, 128, 64, ("LENGTHS",)),
        (256, brain, 64, 64, ("PARTIAL", "CAUSAL")),
        (256, brain, 128, 128, ("PARTIAL", "CAUSAL", "SEGMENTS", "BITS", "LENGTHS")),
        (32, half, 32, 32, ()),
        (64, half, 16, 16, ()),
        (64, single, 64, 64, ()),
        (128, half, 256, 128, ("LENGTHS",)),
        (128, brain, 64, 64, ("PARTIAL", "CAUSAL")),
        (128, half, 128, 64, ("PARTIAL", "SEGMENTS", "LENGTHS")),
        (64, brain, 64, 64, ("PARTIAL", "BITS")),
        (128, brain, 128, 128, ("PARTIAL", "CAUSAL", "SEGMENTS", "BITS", "LENGTHS")),
    ]
    found = [_forward(*form, major) for form in forms for major in (8, 9) if major == 8 or _own_form(form[0], form[1])]
    return [*found, *(_merge(D, dtype) for D in (64, 128, 256) for dtype in (half, brain))]


def _own_form(D: int, dtype: torch.dtype) -> bool:
    return (D, dtype.itemsize) in HOPPER


def _forward(D: int, dtype: torch.dtype, block_q: int, block_k: int, flags: tuple[str, ...], major: int) -> Variant:
    tile = tile_of(D, dtype, block_q, block_k, major)
    constants: dict[str, Any] = {
        **{name: name in flags for name in FLAGS},
        "D": D,
        "D_PAD": padded(D),
        "BLOCK_Q": block_q,
        "BLOCK_K": block_k,
        "BM": tile.rows,
        "BN": tile.keys,
        "BP": partial_keys(D, tile),
        "PRECISION": "tf32x3",
    }
    types = _types(forward_kernel, dtype)
    types |= {"kv_idx": "*i16", "part_idx": "*i16", "part_bits": "*i64", "q_seg": "*i64", "kv_seg": "*i64"}
    absent = {"part_idx": "PARTIAL", "part_num": "PARTIAL", "part_bits": "BITS", "q_seg": "SEGMENTS"}
    absent |= {"kv_seg": "SEGMENTS", "kv_lens": "LENGTHS", "begun": "RESUME", "begun_lse": "RESUME"}
    constants |= {name: None for name, flag in absent.items() if not constants[flag]}
    shown = "+".join(name.lower() for name in FLAGS if constants[name] and name != "PARTIAL")
    name = f"sparse.forward D{D} {NAMES[dtype]} {block_q}x{block_k} {shown}".strip()
    targets: tuple[str, ...] = ("sm80", "sm120") if _own_form(D, dtype) else ("sm80", "sm90", "sm120")
    if major == 9:
        name, targets = f"{name} (Hopper)", ("sm90",)
    return Variant(name, forward_kernel, types, constants, tile.warps, tile.stages, tile.stages > 1, LOOSE, targets)


def _merge(D: int, dtype: torch.dtype) -> Variant:
    types = _types(merge_kernel, dtype)
    types |= {"part": "*fp32", "part_lse": "*fp32", "part_s": "i64", "lse_s": "i64"}
    constants = {"D": D, "D_PAD": padded(D), "BM": 32}
    return Variant(f"sparse.merge D{D} {NAMES[dtype]}", merge_kernel, types, constants, 4, 1, False, LOOSE)


def _types(kernel: Any, dtype: torch.dtype) -> dict[str, str]:
    """Triton types of the arguments that all kernels name alike; every other argument is a 32-bit integer."""
    known = {"q": dtype, "k": dtype, "v": dtype, "out": dtype}
    types = {name: "i32" for name in kernel.arg_names if not name.isupper()}
    types |= {name: f"*{NAMES[x]}" for name, x in known.items() if name in types}
    types |= {name: "*i32" for name in ("kv_num", "part_num", "kv_lens", "order") if name in types}
    types |= {name: "*fp32" for name in ("lse", "begun", "begun_lse") if name in types}
    return types | {name: "fp32" for name in ("sign", "scale2") if name in types}
