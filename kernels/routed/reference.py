"""Attention of routed heads exactly as the formula reads: all heads dense, times their gates, in fp32."""

from __future__ import annotations

import torch
from torch import Tensor


def routed_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    active: Tensor,
    *,
    shared: int = 0,
    gates: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """O_i = g_i softmax(scale q_i k^T) v of MoH (arXiv 2410.11842), 0 where a head is not active. Quadratic memory.

    For the arguments see :func:`patchkit.kernels.routed_attention`.

    Returns:
        (B, H, N, D) in fp32 (fp64 for fp64 inputs).
    """
    B, H, N, D = q.shape
    M, group = k.shape[2], H // k.shape[1]
    exact = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(exact) for x in (q, k, v))
    seen = torch.ones(B, 1, N, M, dtype=torch.bool, device=q.device)
    if causal:
        seen = seen.tril(M - N)
    if mask is not None:
        seen = seen & mask
    # What nobody sees counts as not there, whatever stands in it: 0 * NaN is NaN.
    v = v.masked_fill(~seen.any(2).unsqueeze(-1), 0.0)
    logits = q @ k.repeat_interleave(group, dim=1).transpose(-1, -2) * (D**-0.5 if scale is None else scale)
    weights = logits.masked_fill(~seen, float("-inf")).softmax(-1).masked_fill(~seen.any(-1, keepdim=True), 0.0)
    out = weights @ v.repeat_interleave(group, dim=1)
    if gates is not None:
        out = out * gates.to(exact).unsqueeze(-1)
    return out.masked_fill(~everywhere(active, shared).unsqueeze(-1), 0.0)


def everywhere(active: Tensor, shared: int) -> Tensor:
    """``active`` with the first ``shared`` heads set."""
    if shared == 0:
        return active
    return torch.cat([torch.ones_like(active[:, :shared]), active[:, shared:]], 1)
