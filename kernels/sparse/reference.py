"""Block-sparse attention as the formula reads: softmax over the kept keys only, fp32, one query block at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import BlockLayout


def block_sparse_reference(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """O = softmax(scale * q K_S^T) V_S with S the kept keys of the row (AdaSpa, arXiv 2502.21079, eq. 12).

    Keys that no row of a query block keeps are never touched, so that NaN there cannot spread.

    Args:
        q: (B, H, q_len, D).
        k: (B, Hkv, kv_len, D).
        v: as ``k``.
        layout: the pattern.
        scale: logit scale, default 1 / sqrt(D).

    Returns:
        Output (B, H, q_len, D) in q's dtype and natural-log LSE (B, H, q_len) fp32; empty rows are 0 and -inf.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]
    mask = layout.element_mask().expand(q.shape[0], q.shape[1], -1, -1)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.full(q.shape[:3], float("-inf"), device=q.device)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for start in range(0, layout.q_len, layout.block_q):
                rows = slice(start, min(layout.q_len, start + layout.block_q))
                keys = mask[b, h, rows].any(0).nonzero().squeeze(-1)
                if keys.numel() == 0:
                    continue
                allowed = mask[b, h, rows][:, keys]
                logits = q[b, h, rows].float() @ k[b, h // group, keys].float().T * scale
                logits = logits.masked_fill(~allowed, float("-inf"))
                row_lse = torch.logsumexp(logits, -1)
                p = torch.exp(logits - row_lse.masked_fill(row_lse == float("-inf"), 0.0).unsqueeze(-1))
                out[b, h, rows] = (p @ v[b, h // group, keys].float()).to(q.dtype)
                lse[b, h, rows] = row_lse
    return out, lse
