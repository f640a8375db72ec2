"""Redistribution of attention from sinks to image tokens, exactly as the formula reads: on the map, in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from ..classes.reference import logits_reference

OTHER, TEXT_SINK, VISUAL_SINK, TARGET = range(4)  # classes of keys: neither, and the three that matter
CLASSES = 4


def redistribute_map(
    weights: Tensor, classes: Tensor, recycle: float, rho: float, least: float, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Steps 2 and 3 of VAR (arXiv 2503.03321) on post-softmax rows.

    Args:
        weights: (B, H, q_len, kv_len) rows that sum to 1 (or to 0: rows that see nothing).
        classes: (B or 1, kv_len): ``OTHER``, ``TEXT_SINK``, ``VISUAL_SINK`` or ``TARGET`` (a visual token, no sink).
        recycle: p, the share of the sinks' attention that is moved.
        rho: a head is edited if at least this share of its visual attention lies outside the sinks ...
        least: ... and its visual attention is at least this.
        allowed: (B or 1, q_len) bool, rows that may be edited; None = all.

    Returns:
        The edited rows, and which were edited: (B, H, q_len) bool.
    """
    kind = classes[:, None, None, :]
    sink, target = (kind == TEXT_SINK) | (kind == VISUAL_SINK), kind == TARGET
    targets = torch.where(target, weights, 0).sum(-1)  # a_N
    visual = targets + torch.where(kind == VISUAL_SINK, weights, 0).sum(-1)  # a_V
    selected = (visual >= least) & (targets >= rho * visual) & (targets > 0)
    if allowed is not None:
        selected = selected & allowed[:, None]
    budget = recycle * torch.where(sink, weights, 0).sum(-1)  # Omega
    more = weights + budget[..., None] * weights / targets.clamp_min(torch.finfo(weights.dtype).tiny)[..., None]
    edited = torch.where(sink, (1 - recycle) * weights, torch.where(target, more, weights))
    return torch.where(selected[..., None], edited, weights), selected


def redistribute_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    classes: Tensor,
    *,
    recycle: float,
    rho: float,
    least: float,
    allowed: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention with redistribution by the explicit map. Quadratic memory.

    Returns:
        (B, H, q_len, D) fp32 and which rows were edited, (B, H, q_len) bool.
    """
    s = logits_reference(q, k, classes, mask, scale, softcap)
    weights = torch.softmax(s, -1).nan_to_num(0.0)  # rows that see nothing are 0
    edited, selected = redistribute_map(weights, classes, recycle, rho, least, allowed)
    return edited @ v.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1), selected
