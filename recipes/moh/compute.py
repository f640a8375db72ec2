"""One attention op with gates: every head computed and multiplied, or only the active ones."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from patchkit import kernels
from patchkit.context import AttentionCall
from patchkit.kernels import routed
from patchkit.masks import NOTHING_LEFT
from patchkit.recipes.moh.budget import Budget
from patchkit.recipes.moh.gates import Gates

Next = Callable[[AttentionCall], Tensor]


def gated(call: AttentionCall, next: Next, gates: Gates) -> Tensor:
    """The reference, and the way to train: attention of every head, then its gate. Returns (B, H, N, D)."""
    out = next(call)
    value = gates.value if gates.value is not None else gates.active
    return out * value[..., None].to(out.dtype)


def why_gated(call: AttentionCall, gates: Gates) -> str | None:
    """Why every head has to be computed in this call, or None if the active ones do."""
    if gates.straight:
        return "gradients are recorded: straight-through gates need the heads that are off"
    if call.extra.get("dropout"):
        return "dropout"
    if call.softcap is not None:
        return "capped logits"
    if call.site.learned_sinks:
        return "learned sinks"
    return call.unreadable_mask


def attend(call: AttentionCall, next: Next, gates: Gates, budget: Budget, min_tokens: int | None) -> Tensor:
    """Attention with gates, by whichever way fits the call; the ledger says which and why.

    ``min_tokens``: queries from which on only the active heads are computed; None = where that is known to be faster.
    """
    if budget.everything and gates.value is None:
        return next(call)  # to the bit what would have run without us
    reason = why_gated(call, gates) or _too_few(call, budget, min_tokens)
    # a number of tokens is an order: the call is not to be computed whole after all
    path: Any = None if min_tokens is None else _sparse_path(call)
    if reason is None and path is None and not torch.compiler.is_compiling():  # a graph has the operator itself count
        found = kernels.routed_path(call.q, call.k, gates.active, budget.shared)
        path = found.name
        reason = _slower(call, found.reason) if path == "dense" else None
    mask = None
    if reason is None:
        mask, reason = _yes_or_no(call)
    if reason is not None:
        call.ledger.ran_dense(reason)
        return gated(call, next, gates)
    call.ledger.count("active heads only")
    return kernels.routed_attention(
        call.q,
        call.k,
        call.v,
        gates.active,
        shared=budget.shared,
        gates=gates.value,
        scale=call.scale,
        causal=call.causal and mask is None,
        mask=mask,
        path=path,
    )


def _too_few(call: AttentionCall, budget: Budget, min_tokens: int | None) -> str | None:
    """Why a call of this shape is computed whole, or None if what is active decides."""
    if min_tokens is None:
        why = routed.why_dense(call.q, call.k, budget.shared)
        return None if why is None else _slower(call, why)
    return f"fewer than {min_tokens} queries (min_tokens)" if call.q.shape[2] < min_tokens else None


def _sparse_path(call: AttentionCall) -> str:
    return "triton" if routed.triton_obstacle(call.q, call.k) is None else "blocked"


def _slower(call: AttentionCall, why: str) -> str:
    """Without shapes, so that equal reasons are one line of the report."""
    why = re.sub(r"[\d.]+ of the", "most", why.rpartition(": ")[2])
    return ("one query (decoding): " if call.q.shape[2] == 1 else "all heads are computed and gated: ") + why


def _yes_or_no(call: AttentionCall) -> tuple[Tensor | None, str | None]:
    """The mask as bool (B or 1, 1, N or 1, M), None = none besides causality; or why it cannot be one."""
    bare = call.mask is None and (call.window is None or call.k.shape[2] <= call.window)
    mask = None if bare else call.visible()
    if mask is None:
        return None, None
    if mask.dtype != torch.bool:
        if torch.compiler.is_compiling():
            return None, "an additive mask, which a graph cannot look into"
        seen = mask == 0
        if not bool((seen | (mask <= NOTHING_LEFT)).all()):
            return None, "a mask with other values than yes and no"
        mask = seen
    if mask.shape[1] != 1:
        return None, "a mask for each head"
    return mask, None
