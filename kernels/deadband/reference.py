"""The dead-band filter as the formula reads, in fp32."""

from __future__ import annotations

import torch
from torch import Tensor


def dead_band_reference(
    k: Tensor, theta: float | Tensor, reference: Tensor | None = None, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Changes of the keys along the token axis, those of at most ``theta`` dropped (DeltaLLM, arXiv 2507.19608).

    For each element: c = k[n] - r; where |c| > theta, dk[n] = c and r = k[n]; elsewhere dk[n] = 0. The reference r is
    the last value that was passed on, not the previous token's, so the sum of the changes stays within theta of k.

    Returns:
        dk (B, Hkv, N, D) fp32, and how many of its elements are kept, (B, Hkv, N) int32. The first row of a sample (and
        any element of it) counts as kept, rows before ``start`` count as nothing.
    """
    kf = k.float()
    B, H, N, D = kf.shape
    limit = torch.as_tensor(theta, dtype=torch.float32).expand(B, H).unsqueeze(-1)
    begin = torch.zeros(B, dtype=torch.long) if start is None else start
    r = torch.zeros(B, H, D) if reference is None else reference.float().clone()
    dk, kept = torch.zeros(B, H, N, D), torch.zeros(B, H, N, dtype=torch.int32)
    for n in range(N):
        c = kf[:, :, n] - r
        first = ((begin == n) if reference is None else torch.zeros(B, dtype=torch.bool)).view(B, 1, 1)
        keep = ((c.abs() > limit) | first) & (begin <= n).view(B, 1, 1)
        dk[:, :, n] = torch.where(keep, c, torch.zeros(()))
        r = torch.where(keep, kf[:, :, n], r)
        kept[:, :, n] = keep.sum(-1)
    return dk, kept
