"""Block mass as the formula reads, in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

EXPONENT_LIMIT = 30.0


def block_mass_reference(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    block_q: int,
    block_k: int,
    kv_lens: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """W[p, j] = sum over the block of exp(scale * q.k - LSE) (AdaSpa, arXiv 2502.21079). Quadratic memory.

    Returns:
        W (B, H, Nq, Nk) fp32 and the row sums (B, H, q_len) fp32.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    kf = k.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    p = torch.exp((q.float() @ kf.transpose(-1, -2) * scale - lse.unsqueeze(-1)).clamp(max=EXPONENT_LIMIT))
    p = p.masked_fill((lse == float("-inf")).unsqueeze(-1), 0.0)
    if kv_lens is not None:
        valid = torch.arange(k.shape[2], device=k.device) < kv_lens.view(-1, 1, 1, 1)
        p = p.masked_fill(~valid, 0.0)
    padded = torch.nn.functional.pad(p, (0, -p.shape[-1] % block_k, 0, -p.shape[-2] % block_q))
    W = padded.unflatten(3, (-1, block_k)).unflatten(2, (-1, block_q)).sum((3, 5))
    return W, p.sum(-1)
