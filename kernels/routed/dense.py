"""Heads that serve every row: torch's own dense attention, without a mask wherever the shape of the sight allows it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dense.library import dense_with_lse
from ..merge import merge_states
from .sight import Sight


def dense_heads(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Tensor | None, sights: list[Sight] | None = None
) -> Tensor:
    """Attention of all heads and rows, (B, H, N, D); rows that see no key are 0.

    Args:
        q: (B, H, N, D).
        k: (B, G, M, D), H a multiple of G.
        v: as ``k``.
        scale: logit scale.
        causal: aligned to the last key.
        mask: bool, broadcastable to (B, 1, N, M).
        sights: what the rows see. Without them (an accelerator would have to be waited for) all goes into one mask.
    """
    n, m = q.shape[2], k.shape[2]
    square = causal and n > 1
    if mask is None and (not square or n == m):
        return F.scaled_dot_product_attention(q, k, v, is_causal=square, scale=scale, enable_gqa=True)
    if sights is None:
        return _under_mask(q, k, v, _pairs(q, k, causal, mask), scale)
    parts = []
    for b, sight in enumerate(sights):
        one = slice(b, b + 1)
        parts.append(_sample(q[one], k[one], v[one], sight, scale))
    return torch.cat(parts)


def joins(sight: Sight) -> bool:
    """Whether a sample's dense heads need no mask."""
    return sight.stair() is not None


def _sample(q: Tensor, k: Tensor, v: Tensor, sight: Sight, scale: float) -> Tensor:
    k, v = sight.of(k), sight.of(v)
    form = sight.stair()
    if form is None:
        place = torch.arange(sight.count, device=q.device)
        pairs = place < sight.ends.unsqueeze(-1) if sight.pairs is None else sight.pairs
        return _under_mask(q, k, v, pairs[None, None], scale)
    low, first, steps = form
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    attend = F.scaled_dot_product_attention
    if first and low:
        out[:, :, :first] = attend(q[:, :, :first], k[:, :, :low], v[:, :, :low], scale=scale, enable_gqa=True)
    if steps:
        rows, keys = slice(first, first + steps), slice(low, low + steps)
        out[:, :, rows] = _steps(q[:, :, rows], k, v, keys, scale)
    rest = q[:, :, first + steps :]
    if rest.shape[2] and sight.count:
        out[:, :, first + steps :] = attend(rest, k, v, scale=scale, enable_gqa=True)
    return out


def _steps(q: Tensor, k: Tensor, v: Tensor, keys: slice, scale: float) -> Tensor:
    """Rows of a causal square over ``keys``, which all see what lies before it as well."""
    if keys.start == 0:
        last = keys.stop
        return F.scaled_dot_product_attention(
            q, k[:, :, :last], v[:, :, :last], is_causal=True, scale=scale, enable_gqa=True
        )
    own = dense_with_lse(q, k[:, :, keys], v[:, :, keys], None, scale, True)
    past = dense_with_lse(q, k[:, :, : keys.start], v[:, :, : keys.start], None, scale, False)
    return merge_states(*own, *past)[0]


def _pairs(q: Tensor, k: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
    """(B or 1, 1, N or 1, M) bool, on the device."""
    n, m = q.shape[2], k.shape[2]
    pairs = torch.ones(1, 1, 1, m, dtype=torch.bool, device=q.device) if mask is None else mask
    pairs = pairs.reshape((1,) * (4 - pairs.dim()) + tuple(pairs.shape))
    if causal:
        pairs = pairs & torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
    return pairs.expand(*pairs.shape[:-1], m)


def _under_mask(q: Tensor, k: Tensor, v: Tensor, pairs: Tensor, scale: float) -> Tensor:
    if not pairs.shape[-1]:
        return torch.zeros_like(q)
    unseen = ~pairs.any(2).unsqueeze(-1)  # (B or 1, 1, M, 1)
    # What nobody sees counts as not there, whatever stands in it: 0 * NaN is NaN.
    k, v = k.masked_fill(unseen, 0.0), v.masked_fill(unseen, 0.0)
    pairs = pairs.expand(-1, -1, q.shape[2], -1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=pairs, scale=scale, enable_gqa=True)
    return out.masked_fill(~pairs.any(-1, keepdim=True), 0.0)
