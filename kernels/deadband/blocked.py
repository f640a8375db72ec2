"""The dead-band filter in plain torch: one pass over the tokens, all heads and elements of a token at once."""

from __future__ import annotations

import torch
from torch import Tensor


def dead_band_blocked(
    k: Tensor, theta: Tensor, reference: Tensor | None, start: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See :func:`patchkit.kernels.dead_band`; ``theta`` (B, Hkv) fp32."""
    B, H, N, _ = k.shape
    rows = k.permute(2, 0, 1, 3).float().contiguous()  # a token's keys stand together
    out = torch.empty_like(rows)
    limit = theta.unsqueeze(-1)
    kept = torch.zeros(N, B, H, dtype=torch.int32, device=k.device)
    begins = None if start is None else start.view(B, 1, 1)
    # Up to here some sample may still begin, and the rows before a beginning are padding.
    latest = 0 if start is None else int(start.max())
    r = rows[0] if reference is None else reference.float()
    for n in range(N):
        row = rows[n]
        keep = (row - r).abs() > limit
        if reference is None and n <= latest:
            keep = keep | (begins >= n if begins is not None else torch.ones_like(keep))
        r = torch.where(keep, row, r)
        out[n] = r
        kept[n] = keep.sum(-1)
        if begins is not None and n < latest:
            kept[n] *= begins[..., 0] <= n
    return out.permute(1, 2, 0, 3).to(k.dtype), kept.permute(1, 2, 0).contiguous()
