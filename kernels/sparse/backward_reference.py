"""Gradients of block-sparse attention as the formula reads: one query block at a time, at least fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import BlockLayout


def block_sparse_backward_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
    layout: BlockLayout,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of O = P V and L = logsumexp(S), S = scale * q K^T over the kept keys, P = exp(S - L).

    dV = P^T dO; dS = P * (dO V^T - rowsum(dO * O) + dL); dq = scale * dS K; dK = scale * dS^T q. This is the backward
    of FlashAttention (arXiv 2205.14135, algorithm 4) with one more term for the second output: the derivative of L_i by
    S_ij is P_ij.

    Args:
        q: (B, H, q_len, D).
        k: (B, Hkv, kv_len, D).
        v: as ``k``.
        out: the forward's output.
        lse: the forward's natural-log LSE (B, H, q_len).
        dout: gradient of ``out``; None where ``out`` was not used.
        dlse: gradient of ``lse``, None likewise. Values at rows without keys are ignored.
        layout: the pattern.
        scale: logit scale, default 1 / sqrt(D).

    Returns:
        dq, dk, dv in the shapes and dtypes of q, k, v. Rows and keys that attend to nothing have gradient 0.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    work = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    mask = layout.element_mask().expand(q.shape[0], q.shape[1], -1, -1)
    dq, dk, dv = (torch.zeros(x.shape, dtype=work, device=x.device) for x in (q, k, v))
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for start in range(0, layout.q_len, layout.block_q):
                block = slice(start, min(layout.q_len, start + layout.block_q))
                rows = block.start + mask[b, h, block].any(1).nonzero().squeeze(-1)
                keys = mask[b, h, block].any(0).nonzero().squeeze(-1)
                if rows.numel() == 0:
                    continue
                q_b, k_b, v_b = q[b, h, rows].to(work), k[b, h // group, keys].to(work), v[b, h // group, keys].to(work)
                logits = (q_b @ k_b.T * scale).masked_fill(~mask[b, h, rows][:, keys], float("-inf"))
                p = torch.exp(logits - lse[b, h, rows].to(work).unsqueeze(-1))
                ds = torch.zeros_like(p)
                if dout is not None:
                    do = dout[b, h, rows].to(work)
                    dv[b, h // group, keys] += p.T @ do
                    delta = (do * out[b, h, rows].to(work)).sum(-1, keepdim=True)
                    ds += p * (do @ v_b.T - delta)
                if dlse is not None:
                    ds += p * dlse[b, h, rows].to(work).unsqueeze(-1)
                dq[b, h, rows] = scale * ds @ k_b
                dk[b, h // group, keys] += scale * ds.T @ q_b
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
