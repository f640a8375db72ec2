"""One query on a CPU, as in decoding: key-value heads whose query heads are all off are left unread.

Each call of torch's own kernel takes neighbouring heads, as views: nothing is copied. With several threads each takes
whole heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..threads import for_each, width
from .sight import sights_of


def routed_decode(
    q: Tensor, k: Tensor, v: Tensor, active: Tensor, gates: Tensor | None, scale: float, mask: Tensor | None
) -> Tensor:
    """See :func:`patchkit.kernels.routed_attention`; N = 1, contiguous, zero where not active."""
    B, H, G = q.shape[0], q.shape[1], k.shape[1]
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    # the one row sees what anybody sees: no mask is left
    sights = None if mask is None else sights_of(B, 1, k.shape[2], False, mask, q.device)
    alone = width(q.device, B * G) > 1
    group = H // G
    calls = []
    for b, row in enumerate(heads_read(active, G).tolist()):
        one = slice(b, b + 1)
        keys, values = (k[one], v[one]) if sights is None else (sights[b].of(k[one]), sights[b].of(v[one]))
        if not keys.shape[2]:
            continue
        for first, last in runs(row, alone):
            heads, kv = slice(first * group, last * group), slice(first, last)
            calls.append((out[one, heads], q[one, heads], keys[:, kv], values[:, kv]))

    def work(call: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        into, query, keys, values = call
        into.copy_(F.scaled_dot_product_attention(query, keys, values, scale=scale, enable_gqa=group > 1))

    for_each(calls, lambda: work, q.device)
    if gates is not None:
        out *= gates.unsqueeze(-1)
    return out.masked_fill_(~active.unsqueeze(-1), 0.0)


def heads_read(active: Tensor, kv_heads: int) -> Tensor:
    """(B, G) bool: key-value heads that any active query head reads. ``active``: (B, H, 1)."""
    return active.view(active.shape[0], kv_heads, -1).any(-1)


def runs(read: list[bool], alone: bool) -> list[tuple[int, int]]:
    """Those that are True as (first, behind the last): neighbours together, or each alone."""
    found: list[tuple[int, int]] = []
    for j, wanted in enumerate(read):
        if wanted and not alone and found and found[-1][1] == j:
            found[-1] = (found[-1][0], j + 1)
        elif wanted:
            found.append((j, j + 1))
    return found
