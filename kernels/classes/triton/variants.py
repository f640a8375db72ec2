"""The compiled forms of the decoding kernels that the compile gate goes through, made from the launch table."""

from __future__ import annotations

from typing import Any

import torch

from ...gpu import Variant
from .decode import join_kernel, split_kernel
from .table import padded, rows_of, tile_of

NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
# Run-time sizes that a real cache rarely makes divisible by 16.
LOOSE = frozenset({"kv_heads", "keys", "splits", "heads", "group", "stride_cb"})


def variants() -> list[Variant]:
    """Head sizes, dtypes, group sizes and softcap, as :mod:`.launch` launches them."""
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    forms = [
        (64, half, 1, False),
        (128, brain, 1, False),
        (128, brain, 7, False),
        (80, brain, 4, False),
        (256, brain, 2, True),
        (64, single, 4, False),
    ]
    return [*(_split(*form) for form in forms), _join(128), _join(256)]


def _split(D: int, dtype: torch.dtype, group: int, softcap: bool) -> Variant:
    wide, rows = padded(D), rows_of(group, 4)
    tile = tile_of(wide, dtype.itemsize, rows)
    types = {n: "i32" for n in split_kernel.arg_names if not n.isupper()}
    types |= dict.fromkeys(("q", "k", "v"), f"*{NAMES[dtype]}") | {"classes": "*u8"}
    types |= dict.fromkeys(("top", "sums", "values"), "*fp32") | dict.fromkeys(("scale2", "cap"), "fp32")
    constants: dict[str, Any] = {"GROUP": group, "C": 4, "ROWS": rows, "D": D, "D_PAD": wide, "BN": tile.keys}
    constants |= {"SOFTCAP": softcap, "PRECISION": "tf32x3"}
    name = f"classes.decode D{D} {NAMES[dtype]} group {group}{' softcap' if softcap else ''}"
    return Variant(name, split_kernel, types, constants, tile.warps, tile.stages, loose=LOOSE)


def _join(D: int) -> Variant:
    types = {n: "i32" for n in join_kernel.arg_names if not n.isupper()}
    types |= dict.fromkeys(("top", "sums", "values", "out_top", "out_sums", "out"), "*fp32")
    constants = {"C": 4, "ROWS": 16, "S_PAD": 64, "D": D, "D_PAD": padded(D)}
    return Variant(f"classes.join D{D}", join_kernel, types, constants, 4, 3, pipelined=False, loose=LOOSE)
