"""What attention masks say, in the forms that models give them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from patchkit.errors import UnsupportedModel

if TYPE_CHECKING:
    from patchkit.context import AttentionCall

NOTHING_LEFT = -9000.0  # -10000 is -9984 in bfloat16; exp of either is 0 in every dtype


def padding(mask: Tensor) -> Tensor | None:
    """(B or 1, Nk) bool, True = a real key, if the mask only says which keys are padding; else None."""
    if mask.ndim == 2:
        mask = mask[:, None, None, :]
    if mask.ndim != 4 or mask.shape[2] != 1:
        return None
    if mask.shape[1] != 1 and not bool((mask == mask[:, :1]).all()):  # diffusers repeats it for each head
        return None
    mask = mask[:, 0, 0, :]
    if mask.dtype == torch.bool:
        return mask
    blocked = mask <= NOTHING_LEFT
    return ~blocked if bool((blocked | (mask == 0)).all()) else None


def visible(call: AttentionCall, rows: Tensor | None) -> Tensor | None:
    """See :meth:`patchkit.context.AttentionCall.visible`."""
    mask, queries, keys = call.mask, call.q.shape[2], call.k.shape[2]
    unknown = unreadable(mask)
    if unknown is not None:
        raise UnsupportedModel(unknown, call.site.full_name, "ask call.unreadable_mask first")
    one_way = call.causal
    window = call.window
    if mask is not None and mask.ndim == 2:  # of the keys only, as flash attention wants it
        one_way = queries > 1 and bool(getattr(call.site.module, "is_causal", True))
        mask = mask[:, None, None, -keys:].bool()
    elif mask is not None:  # causality and window are in it
        window = None
        mask = mask[:, :, rows] if rows is not None and mask.shape[2] == queries else mask
    if not one_way and (window is None or keys <= window):
        return mask
    rows = torch.arange(queries, device=call.q.device) if rows is None else rows
    row = rows[:, None] + (keys - queries)
    key = torch.arange(keys, device=call.q.device)
    seen = key <= row if one_way else key >= 0
    if window is not None:
        seen = seen & (key > row - window)
    return seen[None, None] if mask is None else mask & seen


def unreadable(mask: object) -> str | None:
    """Why nobody here can tell what a mask says; None if it can be told."""
    if mask is None or (isinstance(mask, Tensor) and mask.ndim in (2, 4)):
        return None
    if isinstance(mask, Tensor):
        return f"the mask is a tensor of {mask.ndim} dimensions"
    return f"the mask is a {type(mask).__name__}"
