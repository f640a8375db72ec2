"""The compiled forms of the backward kernels that the compile gate goes through; made from the launch table itself."""

from __future__ import annotations

from typing import Any

import torch

from ...gpu import Variant
from .backward_kv import dkv_kernel
from .backward_q import dq_kernel
from .backward_steps import rows_kernel
from .backward_table import tiles_of
from .table import padded, precision

NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
FLAGS = ("PARTIAL", "CAUSAL", "SEGMENTS", "BITS", "LENGTHS")
TENSORS = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")
INDICES = ("kv_idx", "complete_idx", "full_idx", "part_idx")
# Compiled away (None) unless the flag is set.
OPTIONAL = {
    "part_idx": "PARTIAL",
    "part_num": "PARTIAL",
    "part_slot": "PARTIAL",
    "part_start": "PARTIAL",
    "part_bits": "BITS",
    "q_seg": "SEGMENTS",
    "kv_seg": "SEGMENTS",
    "kv_lens": "LENGTHS",
}
# Run-time sizes that a real sequence rarely makes divisible by 16.
LOOSE = frozenset(
    {"heads", "group", "n_q", "n_k", "q_len", "kv_len", "offset", "row_b", "row_h", "list_b", "list_h"}
    | {"kv_width", "part_width", "complete_width"}
)


def variants() -> list[Variant]:
    """Head sizes, dtypes, blocks and each structural flag, as the launches make them."""
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    found = []
    for make in (_dq, _dkv):
        found += [
            make(64, brain, 64, 64),
            make(128, half, 64, 64),
            make(128, brain, 64, 64),
            make(128, brain, 128, 128, LENGTHS=True),
            make(80, brain, 64, 64),
            make(256, brain, 64, 64),
            make(256, brain, 64, 64, PARTIAL=True, CAUSAL=True),
            make(64, half, 16, 16),
            make(64, single, 64, 64),
            make(128, brain, 64, 64, PARTIAL=True, CAUSAL=True),
            make(128, half, 128, 64, PARTIAL=True, SEGMENTS=True, LENGTHS=True),
            make(128, brain, 64, 64, PARTIAL=True, CAUSAL=True, SEGMENTS=True, BITS=True, LENGTHS=True),
            make(64, brain, 64, 64, PARTIAL=True, BITS=True),
        ]
    found += [_dq(128, single, 64, 64), _dkv(128, brain, 64, 64, EVEN=True), _dkv(64, brain, 64, 64, NEED_K=False)]
    return [*found, _rows(64, half), _rows(128, brain), _rows(256, brain)]


def _dq(D: int, dtype: torch.dtype, block_q: int, block_k: int, **flags: bool) -> Variant:
    tile, _ = tiles_of(padded(D), dtype, block_q, block_k)
    return _main("dq", dq_kernel, D, dtype, block_q, block_k, tile, flags, {})


def _dkv(D: int, dtype: torch.dtype, block_q: int, block_k: int, **flags: bool) -> Variant:
    _, tile = tiles_of(padded(D), dtype, block_q, block_k)
    own = {"EVEN": flags.pop("EVEN", False), "NEED_K": flags.pop("NEED_K", True)}
    return _main("dkv", dkv_kernel, D, dtype, block_q, block_k, tile, flags, own)


def _main(
    kind: str,
    kernel: Any,
    D: int,
    dtype: torch.dtype,
    block_q: int,
    block_k: int,
    tile: Any,
    flags: dict[str, bool],
    own: dict[str, bool],
) -> Variant:
    constants: dict[str, Any] = {name: flags.get(name, False) for name in FLAGS}
    constants |= {"D": D, "D_PAD": padded(D), "BLOCK_Q": block_q, "BLOCK_K": block_k, "BM": tile.rows, "BN": tile.keys}
    constants |= {"PRECISION": precision(dtype, "cuda"), **own}
    types = _types(kernel, dtype)
    constants |= {name: None for name, flag in OPTIONAL.items() if name in types and not constants[flag]}
    if own.get("NEED_K") is False:
        constants["dk"] = None
    shown = [name.lower() for name in (*FLAGS[1:], "EVEN") if constants.get(name)]
    shown += ["only-v"] if own.get("NEED_K") is False else []
    name = f"sparse.backward.{kind} D{D} {NAMES[dtype]} {block_q}x{block_k} {'+'.join(shown)}".strip()
    return Variant(name, kernel, types, constants, tile.warps, tile.stages, tile.stages > 1, LOOSE)


def _rows(D: int, dtype: torch.dtype) -> Variant:
    constants = {"D": D, "D_PAD": padded(D), "BM": 32, "WITH_LSE": True}
    name = f"sparse.backward.rows D{D} {NAMES[dtype]}"
    return Variant(name, rows_kernel, _types(rows_kernel, dtype), constants, 4, 3, False, LOOSE)


def _types(kernel: Any, dtype: torch.dtype) -> dict[str, str]:
    """Triton types of the arguments that all kernels name alike; every other argument is a 32-bit integer."""
    types = {name: "i32" for name in kernel.arg_names if not name.isupper()}
    known = dict.fromkeys(TENSORS, f"*{NAMES[dtype]}") | dict.fromkeys(INDICES, "*i16")
    known |= dict.fromkeys(("kv_num", "part_num", "full_num", "complete_num", "part_slot", "kv_lens", "order"), "*i32")
    known |= dict.fromkeys(("full_start", "part_start", "part_bits", "q_seg", "kv_seg"), "*i64")
    known |= dict.fromkeys(("lse", "dlse", "shift", "delta"), "*fp32") | dict.fromkeys(("scale", "scale2"), "fp32")
    return types | {name: x for name, x in known.items() if name in types}
