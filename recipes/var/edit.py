"""One attention op: which rows are edited, and the edit itself.

What is particular to VAR is in :func:`patchkit.kernels.redistribute`. Choosing rows, leaving all others to the model's
own op and counting are common to edits of attention between kinds of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patchkit import kernels
from patchkit.context import AttentionCall
from patchkit.kernels.redistribute import decode_obstacle, redistribute_decode
from patchkit.recipes.var.sinks import KeyMap

ROWS = 128  # of queries at a time: (B, H, 128, Nk) fp32 is kept
FUSED_KEYS = 512  # from so many keys on, reading them twice while decoding is worth a kernel of its own


@dataclass(frozen=True)
class Strength:
    """The numbers of the edit; see :func:`patchkit.kernels.redistribute`."""

    recycle: float
    rho: float
    least: float


def eligible(call: AttentionCall, keys: KeyMap) -> Tensor:
    """(B, Nq) bool: text queries (not visual, not padding) of the samples that may be edited."""
    assert call.real is not None
    assert call.first is not None
    assert keys.edits is not None
    if call.q.shape[2] == 1:
        return keys.edits[:, None]
    span = slice(call.first, call.first + call.q.shape[2])
    return ~keys.visual[:, span] & call.real[:, span] & keys.edits[:, None]


def edit(call: AttentionCall, out: Tensor, keys: KeyMap, strength: Strength) -> Tensor:
    """``out`` (B, H, Nq, D), the model's own, with its eligible rows edited. Everything else keeps its bits."""
    allowed = eligible(call, keys)
    if call.q.shape[2] == 1:
        return _edited(call, out, keys, strength, allowed, None)
    rows = allowed.any(0).nonzero()[:, 0]
    if len(rows) == call.q.shape[2] <= ROWS:
        return _edited(call, out, keys, strength, allowed, None)
    result = out.clone()
    wide = call.replace(k=call.k.float(), v=call.v.float())  # once for all chunks
    for some in rows.split(ROWS):
        result[:, :, some] = _edited(wide, out[:, :, some], keys, strength, allowed[:, some], some)
    return result


def fused(call: AttentionCall, keys: KeyMap, strength: Strength) -> Tensor | None:
    """Dense attention of a decoded token and the edit in one pass over the cache; None where that is not to be had.

    Only with a long cache, on a GPU or in fp32 on a CPU. Rows that are not edited then agree with the model's own op
    to rounding.
    """
    if call.q.shape[2] != 1 or call.k.shape[2] < FUSED_KEYS:
        return None
    mask = call.visible()
    if decode_obstacle(call.q, call.k, call.v, mask) is not None:
        return None
    moved = redistribute_decode(
        call.q,
        call.k,
        call.v,
        keys.classes,
        recycle=strength.recycle,
        rho=strength.rho,
        least=strength.least,
        allowed=eligible(call, keys),
        mask=mask,
        scale=call.scale,
        softcap=call.softcap,
    )
    count(call, moved.selected, moved.mass, keys.count)
    return moved.out


def _edited(
    call: AttentionCall, out: Tensor, keys: KeyMap, strength: Strength, allowed: Tensor, rows: Tensor | None
) -> Tensor:
    q = call.q if rows is None else call.q[:, :, rows]
    moved = kernels.redistribute(
        out,
        q.to(call.k.dtype),
        call.k,
        call.v,
        keys.classes,
        recycle=strength.recycle,
        rho=strength.rho,
        least=strength.least,
        allowed=allowed,
        mask=call.visible(rows),
        scale=call.scale,
        softcap=call.softcap,
    )
    count(call, moved.selected, moved.mass, keys.count if rows is None and out.shape[2] == 1 else allowed.sum())
    return moved.out


def count(call: AttentionCall, selected: Tensor, mass: Tensor, rows: int | Tensor) -> None:
    """Write down, a head, how many of its eligible rows were edited, and how much attention they moved."""
    if selected.device.type == "cpu" and not bool(selected.any()):
        heads = torch.zeros(selected.shape[1])
        call.ledger.average(selected_rate=(heads, rows), moved_mass=(heads, heads))
        return
    edited = selected.sum((0, 2))
    call.ledger.average(selected_rate=(edited, rows), moved_mass=(mass.sum((0, 2)), edited))
