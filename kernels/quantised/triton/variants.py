"""The forms in which the kernels of quantised attention are launched, for the compile gate."""

from __future__ import annotations

from typing import Any

import torch

from ...gpu import Variant
from ..formats import P_ROWS, Q_GROUP, Format
from .attend import attend_kernel
from .launch import PREPARE_WARPS
from .prepare import rows_kernel, values_kernel
from .table import padded, tile_of

TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
FP8_TARGETS = ("sm90", "sm120")
LOOSE: tuple[str, ...] = ("row_b", "row_h", "kv_width", "q_groups", "k_groups", "heads", "k_group", "v_group")
LOOSE += ("mean_group", "n_q", "q_len", "kv_len", "start", "stop")


def variants() -> list[Variant]:
    """Every form of launch for the shapes that matter."""
    bf16, half = torch.bfloat16, torch.float16
    found = [
        _attend(64, bf16, 64, Format(), reorder=True),
        _attend(128, bf16, 64, Format(), reorder=True),
        _attend(64, half, 128, Format()),
        _attend(128, bf16, 128, Format(), lens=True),
        _attend(80, bf16, 64, Format()),
        _attend(128, bf16, 64, Format("int8", "int8"), reorder=True),
        _attend(64, half, 64, Format("int8", "int8", p_scale="row"), lens=True),
        _attend(128, bf16, 128, Format("int8", "int8", p_scale="row")),
        _attend(128, half, 64, Format("none", "int8")),
        _attend(128, bf16, 128, Format("int8", "fp8")),
        _attend(64, bf16, 64, Format("int8", "fp8"), reorder=True),
        _attend(64, bf16, 32, Format("int8", "int8"), block_k=32),
    ]
    found += [_rows(D, bf16, reorder, keys) for D in (64, 128) for reorder in (False, True) for keys in (False, True)]
    found += [_values(64, bf16, "int8", True), _values(128, bf16, "int8", False), _values(128, bf16, "fp8", True)]
    return found


def _attend(
    D: int,
    dtype: torch.dtype,
    block_q: int,
    form: Format,
    block_k: int = 64,
    lens: bool = False,
    reorder: bool = False,
) -> Variant:
    tile = tile_of(D, dtype.itemsize, block_q, block_k, form.pv)
    kind, eight = TYPES[dtype], form.qk != "none"
    constants: dict[str, Any] = {
        "D": D,
        "D_PAD": padded(D),
        "BLOCK_Q": block_q,
        "BLOCK_K": block_k,
        "BM": tile.rows,
        "BN": tile.keys,
        "Q_GROUP": min(Q_GROUP, block_q),
        "ROWS": min(P_ROWS, tile.rows) if form.p_scale == "block" else 0,
        "QK": int(eight),
        "PV": {"none": 0, "fp8": 2}.get(form.pv, 1),
        "SMOOTH_V": form.smooths_v,
        "SHIFT": form.smooths_k,
        "LENGTHS": lens,
        "REORDER": reorder,
        "PRECISION": "tf32x3",
    }
    types = dict.fromkeys(attend_kernel.arg_names, "i32")
    types |= dict.fromkeys(("q", "k"), "*i8" if eight else kind) | {"out": kind, "lse": "*fp32", "order": "*i32"}
    types |= {"v": {"none": kind, "fp8": "*fp8e4nv"}.get(form.pv, "*i8"), "kv_idx": "*i16", "kv_num": "*i32"}
    types |= {"scale2": "fp32", "top": "fp32"}
    optional = {"q_scale": eight, "k_scale": eight, "shift": form.smooths_k, "kv_lens": lens, "table": reorder}
    optional |= {"v_scale": form.pv != "none", "v_mean": form.smooths_v}
    for name, there in optional.items():
        types[name] = "*i32" if name in ("kv_lens", "table") else "*fp32"
        constants |= {} if there else {name: None}
    constants |= {"v_d": 0} if form.pv == "none" else {"v_n": 0}
    types = {name: kind for name, kind in types.items() if name not in constants}
    loose = frozenset(LOOSE)
    flags = " ".join(n for n, on in (("lens", lens), ("reordered", reorder), (form.p_scale, form.pv != "none")) if on)
    name = f"quantised.attend D{D} {kind[1:]} {form.qk}-{form.pv} {block_q}x{block_k} {flags}".strip()
    targets = FP8_TARGETS if form.pv == "fp8" else ("sm80", "sm90", "sm120")
    integer = eight or form.pv in ("int8", "int4")
    return Variant(
        name, attend_kernel, types, constants, tile.warps, tile.stages, integer=integer, loose=loose, targets=targets
    )


def _rows(D: int, dtype: torch.dtype, reorder: bool, keys: bool) -> Variant:
    constants: dict[str, Any] = {"D": D, "D_PAD": padded(D), "GROUP": 64 if keys else 32, "REORDER": reorder}
    constants |= {"SMOOTH": keys, "SHIFT": not keys, "LENGTHS": False, "lens": None}
    constants |= {} if reorder else {"table": None}
    constants |= {"shift": None} if keys else {}
    types = dict.fromkeys(rows_kernel.arg_names, "i32")
    types |= {"x": TYPES[dtype], "out": "*i8", "table": "*i32", "factor": "fp32", "natural": "fp32", "top": "fp32"}
    types |= dict.fromkeys(("mean", "scales", "shift"), "*fp32")
    types = {name: kind for name, kind in types.items() if name not in constants}
    loose = frozenset(("heads", "group", "mean_heads", "mean_group", "start", "stop", "N", "groups"))
    name = f"quantised.rows D{D} {TYPES[dtype][1:]} {'keys' if keys else 'queries'}{' reordered' if reorder else ''}"
    return Variant(name, rows_kernel, types, constants, PREPARE_WARPS, 1, pipelined=False, loose=loose)


def _values(D: int, dtype: torch.dtype, pv: str, reorder: bool) -> Variant:
    constants: dict[str, Any] = {"D": D, "D_PAD": padded(D), "BN": 64, "REORDER": reorder, "SMOOTH": True}
    constants |= {"LENGTHS": False, "lens": None} | ({} if reorder else {"table": None})
    types = dict.fromkeys(values_kernel.arg_names, "i32")
    types |= {"x": TYPES[dtype], "out": "*fp8e4nv" if pv == "fp8" else "*i8", "table": "*i32", "top": "fp32"}
    types |= dict.fromkeys(("mean", "scales"), "*fp32")
    types = {name: kind for name, kind in types.items() if name not in constants}
    loose = frozenset(("heads", "group", "kv_heads", "start", "stop", "N"))
    name = f"quantised.values D{D} {TYPES[dtype][1:]} {pv}{' reordered' if reorder else ''}"
    targets = FP8_TARGETS if pv == "fp8" else ("sm80", "sm90", "sm120")
    return Variant(
        name, values_kernel, types, constants, PREPARE_WARPS, 1, pipelined=False, loose=loose, targets=targets
    )
