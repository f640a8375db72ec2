"""Statistics of the blocks of an attention map, as the formulas read: the whole map in fp32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def block_statistics_reference(
    q: Tensor, k: Tensor, lse: Tensor, block: int, eps: float, scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum, largest entry and number of entries below ``eps`` of every block of P = exp(scale q k^T - lse).

    Args:
        q: (B, H, q_len, D).
        k: (B, Hkv, kv_len, D).
        lse: (B, H, q_len), natural logarithm.
        block: both sides of a block; ragged ones count their own entries only.
        eps: what counts as small.
        scale: logit scale, default 1 / sqrt(D).

    Returns:
        Three fp32 tensors (B, H, Nq, Nk).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    keys = k.float().repeat_interleave(q.shape[1] // k.shape[1], 1)
    p = (q.float() @ keys.transpose(-1, -2) * scale - lse.unsqueeze(-1)).exp()
    return statistics_of_map(p, block, eps)


def statistics_of_map(p: Tensor, block: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same of a given map P (..., q_len, kv_len)."""
    tails = (0, -p.shape[-1] % block, 0, -p.shape[-2] % block)

    def blocks(x: Tensor) -> Tensor:
        return F.pad(x, tails).unflatten(-1, (-1, block)).unflatten(-3, (-1, block))

    return (
        blocks(p).sum((-3, -1)),
        blocks(p).amax((-3, -1)),
        blocks((p < eps).to(torch.float32)).sum((-3, -1)),
    )
