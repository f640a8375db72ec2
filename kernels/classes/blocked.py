"""Attention over classes of keys in plain torch: the logits of a few rows at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .parts import Weighted
from .reference import HIDDEN


def class_attention_blocked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    classes: Tensor,
    count: int,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    boost: Sequence[float] | None,
) -> Weighted:
    """(B, H, q_len, kv_len) fp32 of memory: give it a chunk of rows. Differentiable."""
    B, H, n, D = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    rows = (q.float() * scale).reshape(B, kv_heads, -1, D)
    if rows.shape[2] == 1:  # a matrix times a vector: much faster in this order on a CPU
        s = (k.float() @ rows.transpose(-1, -2)).view(B, H, n, keys)
    else:
        s = (rows @ k.float().transpose(-1, -2)).view(B, H, n, keys)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    members = (classes[..., None] == torch.arange(count, device=classes.device)).float()  # (B | 1, M, C)
    if boost is not None:
        s = s + s.abs() * (members @ torch.tensor(boost, device=s.device, dtype=torch.float32))[:, None, None]
    hidden = (classes == HIDDEN)[:, None, None]
    if mask is None:
        s = s.masked_fill(hidden, float("-inf"))
    elif mask.dtype == torch.bool:
        s = s.masked_fill(~mask | hidden, float("-inf"))
    else:
        s = (s + mask.float()).masked_fill(hidden, float("-inf"))
    top = s.amax(-1)
    top = top.masked_fill(top == float("-inf"), 0.0).detach()
    weights = torch.exp(s - top[..., None])
    sums = weights @ members[:, None]
    return Weighted(top, sums, weights, members, v.float())
