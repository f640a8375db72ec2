"""Attention over classes of keys, exactly as the formula reads, in fp32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

HIDDEN = 255  # class of a key that nobody sees


def logits_reference(
    q: Tensor,
    k: Tensor,
    classes: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    boost: Sequence[float] | None = None,
) -> Tensor:
    """Scaled, capped, boosted and masked logits (B, H, q_len, kv_len) in fp32. Quadratic memory."""
    kf = k.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    s = q.float() @ kf.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    of_key = classes[:, None, None, :]
    for number, gain in enumerate(boost or ()):
        s = torch.where(of_key == number, s + gain * s.abs(), s)
    if mask is not None:
        s = s.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else s + mask.float()
    return s.masked_fill(of_key == HIDDEN, float("-inf"))


def class_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    classes: Tensor,
    count: int,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    boost: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention inside each class by itself; arguments as those of ``class_attention``.

    Returns:
        Outputs (B, H, q_len, count, D) and natural-log LSEs (B, H, q_len, count), fp32. Where a class has no visible
        key: 0 and -inf.
    """
    s = logits_reference(q, k, classes, mask, scale, softcap, boost)
    vf = v.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    outs, lses = [], []
    for number in range(count):
        inside = s.masked_fill((classes != number)[:, None, None, :], float("-inf"))
        lse = torch.logsumexp(inside, -1)
        p = torch.exp(inside - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
        outs.append(p @ vf)
        lses.append(lse)
    return torch.stack(outs, 3), torch.stack(lses, 3)
