"""The forms of the routed-heads kernel that the compile gate goes through; made from the launch table itself."""

from __future__ import annotations

import torch

from ...gpu import Variant
from ...sparse.triton.table import HOPPER
from .forward import BY_KEY, BY_PAIR, NO_MASK, UNSPECIALISED, routed_kernel
from .launch import constants_of
from .table import padded, tile_for

NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
MASKS = {NO_MASK: "", BY_KEY: "+keys", BY_PAIR: "+pairs"}
# Gates and masks have strides of any size.
LOOSE = frozenset({*UNSPECIALISED, "gates", "mask", "gate_b", "gate_h", "gate_n", "mask_b", "mask_n", "mask_m"})

Form = tuple[int, torch.dtype, bool, int, bool]


def variants() -> list[Variant]:
    """Head sizes, dtypes and each structural flag, as :mod:`.launch` launches them."""
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    forms: list[Form] = [
        *((D, brain, True, NO_MASK, True) for D in (64, 72, 96, 128, 256)),
        *((D, half, True, BY_KEY, True) for D in (64, 72, 128, 256)),
        *((D, brain, True, BY_PAIR, True) for D in (64, 128, 256)),
        (64, half, False, NO_MASK, False),
        (64, single, True, BY_KEY, True),
    ]
    found = []
    for form in forms:
        own = (padded(form[0]), form[1].itemsize) in HOPPER and padded(form[0]) == form[0]
        found += [_variant(form, major, own) for major in ((8, 9) if own else (8,))]
    return found


def _variant(form: Form, major: int, own: bool) -> Variant:
    """``own``: Hopper has a tile of its own for this form."""
    D, dtype, causal, mask, gates = form
    tile = tile_for(D, dtype, mask != NO_MASK, major)
    constants = constants_of(D, tile, causal, mask, gates, "tf32x3")
    constants |= {
        name: None for name, there in (("gates", gates), ("mask", mask), ("bounds", mask == BY_KEY)) if not there
    }
    types = {name: "i32" for name in routed_kernel.arg_names if not name.isupper()}
    types |= dict.fromkeys(("q", "k", "v", "out"), f"*{NAMES[dtype]}") | {"sign": "fp32", "scale2": "fp32"}
    types |= {"rows": "*i32", "counts": "*i32", "bounds": "*i32", "mask": "*u8", "gates": "*fp32"}
    name = f"routed D{D} {NAMES[dtype]} {tile.rows} rows{' causal' if causal else ''}{MASKS[mask]}{'+gates' * gates}"
    targets: tuple[str, ...] = ("sm80", "sm120") if own else ("sm80", "sm90", "sm120")
    if major == 9:
        name, targets = f"{name} (Hopper)", ("sm90",)
    return Variant(name, routed_kernel, types, constants, tile.warps, tile.stages, True, LOOSE, targets)
