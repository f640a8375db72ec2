"""What a mask says: where each sample begins, and whether that and causality is all it says."""

from __future__ import annotations

import torch
from torch import Tensor

from patchkit.context import AttentionCall

NOTHING = -9000.0  # an additive mask this low leaves nothing of a key
ROWS = 512  # of a mask that are compared at a time


def starts_of(call: AttentionCall, keys: int) -> list[int] | str:
    """First real token of each sample among ``keys``, or why this attention is not plainly causal.

    The answer for one mask is kept for the other layers, which are given the same one.
    """
    mask, batch = call.mask, call.q.shape[0]
    if mask is None:
        if call.causal or call.q.shape[2] == 1:
            return [0] * batch
        return "attention that is not causal"
    known = call.shared.get("mask")
    if known is None or known[0] is not mask or known[1] != keys:
        call.shared["mask"] = known = (mask, keys, _read(mask, keys, batch))
    found: list[int] | str = known[2]
    return found


def _read(mask: Tensor, keys: int, batch: int) -> list[int] | str:
    if mask.dim() != 4 or mask.shape[-1] != keys or mask.shape[1] != 1:
        return f"a mask of shape {tuple(mask.shape)} over {keys} keys"
    seen = visible(mask)[:, 0]
    last = seen[:, -1]
    starts = (~last).sum(-1)
    if not bool((last.cumsum(-1) == (torch.arange(keys, device=mask.device) - starts[:, None] + 1).clamp(min=0)).all()):
        return "a mask that leaves out tokens other than padding on the left"
    offset = keys - seen.shape[1]
    at = torch.arange(keys, device=mask.device)
    for low in range(0, seen.shape[1], ROWS):
        rows = torch.arange(low, min(low + ROWS, seen.shape[1]), device=mask.device) + offset
        wanted = (at <= rows[:, None]) & (at >= starts[:, None, None])
        real = rows >= starts[:, None]  # what a row of padding sees is of no interest
        if bool(((seen[:, low : low + ROWS] != wanted).any(-1) & real).any()):
            return "a mask that is not plainly causal"
    found: list[int] = starts.expand(batch).tolist()
    return found


def visible(mask: Tensor) -> Tensor:
    """The mask as bool, True = attend."""
    return mask if mask.dtype == torch.bool else mask > NOTHING


def additive(mask: Tensor) -> Tensor:
    """The mask as numbers to add to fp32 logits."""
    if mask.dtype != torch.bool:
        return mask.float()
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, float("-inf"))
