"""Decoding with redistribution in plain torch: one query a head, each key and each value read once."""

from __future__ import annotations

import torch
from torch import Tensor

from ..classes.reference import HIDDEN
from .reference import CLASSES, TARGET, TEXT_SINK, VISUAL_SINK


def redistribute_decode_blocked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    classes: Tensor,
    inside: Tensor,
    recycle: float,
    rho: float,
    least: float,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The row of the map is made, weighed anew where a head is edited, and multiplied with the values.

    Args:
        q: (B, H, 1, D).
        k: (B, Hkv, kv_len, D).
        v: as ``k``.
        classes: (B or 1, kv_len) uint8.
        inside: (B,) int8, samples that may be edited.
        recycle: share of the sinks' attention that is moved.
        rho: least share of the visual attention outside the sinks.
        least: least visual attention.
        scale: logit scale.
        softcap: c: logits become c * tanh(s / c).

    Returns:
        (B, H, 1, D) in q's dtype; which heads were edited (B, H, 1) bool; what they moved (B, H, 1) fp32.
    """
    B, H, _, D = q.shape
    shared = k.shape[1]
    rows = (q.float() * scale).view(B, shared, H // shared, D)
    # a matrix times a vector is faster than a vector times a matrix on a CPU
    product = k.float() @ rows.transpose(-1, -2) if shared == H else rows @ k.float().transpose(-1, -2)
    s = product.view(B, H, -1)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if int(classes.amax()) >= HIDDEN:  # every small op counts beside one row
        hidden = (classes == HIDDEN)[:, None]
        # a row that sees nothing is 0
        weights = torch.softmax(s.masked_fill(hidden, float("-inf")), -1).nan_to_num(0.0)
        v = v.masked_fill(hidden[..., None], 0.0)
    else:
        weights = torch.softmax(s, -1)
    # 1 where a key is of a class, (B or 1, classes, kv_len)
    of_class = (classes[:, None] == torch.arange(CLASSES, device=q.device)[:, None]).float()
    sums = torch.matmul(weights, of_class.transpose(-1, -2))  # (B, H, classes)
    targets = sums[..., TARGET]
    visual = targets + sums[..., VISUAL_SINK]
    selected = (visual >= least) & (targets >= rho * visual) & (targets > 0) & (inside > 0)[:, None]
    sinks = sums[..., VISUAL_SINK] + sums[..., TEXT_SINK]
    moved = torch.where(selected, recycle * sinks, 0.0)
    if bool(selected.any()):
        factors = torch.ones_like(sums)
        factors[..., TEXT_SINK] = factors[..., VISUAL_SINK] = torch.where(selected, 1 - recycle, 1.0)
        factors[..., TARGET] += moved / targets.clamp_min(torch.finfo(torch.float32).tiny)
        weights = weights * torch.matmul(factors, of_class)
    out = torch.matmul(weights.view(B, shared, H // shared, -1), v.float()).view(B, H, 1, D)
    return out.to(q.dtype), selected[..., None], moved[..., None]
