"""Dense attention exactly as the formula reads, in fp32."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def dense_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Softmax(scale * q k^T + mask) v; q (B, H, q_len, D), k/v (B, Hkv, kv_len, D). Quadratic memory.

    Returns:
        Output in ``q``'s dtype and the natural-log LSE (B, H, q_len) fp32. Fully masked rows are 0 and -inf.
    """
    group = q.shape[1] // k.shape[1]
    kf, vf = (x.float().repeat_interleave(group, dim=1) for x in (k, v))
    logits = q.float() @ kf.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if causal:
        ones = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device)
        logits = logits.masked_fill(~ones.tril(), float("-inf"))
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask.float()
    lse = torch.logsumexp(logits, -1)
    p = torch.exp(logits - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1))
    return (p @ vf).to(q.dtype), lse
