"""Runs of similar keys in plain torch: all chunks at once, one step a token of a chunk."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TINY = 1e-24  # squared norms below this count as this


def find_runs_blocked(k: Tensor, theta: Tensor, metric: str, chunk: int, single: int, first: int) -> Tensor:
    """See :func:`patchkit.kernels.find_runs`; ``theta`` (B, Hkv) fp32."""
    B, H, N, _ = k.shape
    chunk = min(chunk, N)
    padded = F.pad(k, (0, 0, 0, -N % chunk)) if N % chunk else k
    # A step's keys stand together, in one order whatever the strides of k: sums then give the same bits.
    rows = padded.unflatten(2, (-1, chunk)).permute(3, 0, 1, 2, 4).float().contiguous()  # [chunk, B, H, chunks, D]
    limit = theta.unsqueeze(-1)
    begins = torch.zeros(chunk, B, H, rows.shape[3], dtype=torch.bool, device=k.device)
    begins[0] = True
    head = torch.arange(rows.shape[3], device=k.device) * chunk + first  # position of each chunk's first token
    norms = rows.square().sum(-1).clamp_min(TINY) if metric == "cosine" else rows.new_zeros(chunk)
    anchor, length = rows[0], norms[0]
    for t in range(1, chunk):
        row = rows[t]
        if metric == "max":
            far = (row - anchor).abs().amax(-1) > limit
        elif metric == "euclidean":
            far = (row - anchor).square().sum(-1) > limit.square()
        else:
            far = (row * anchor).sum(-1) < limit * (norms[t] * length).sqrt()
        if first + t <= single:
            far = far | (head + t <= single)
        begins[t] = far
        anchor = torch.where(far.unsqueeze(-1), row, anchor)
        length = torch.where(far, norms[t], length) if metric == "cosine" else length
    return begins.permute(1, 2, 3, 0).flatten(2)[..., :N].contiguous()


def pack_runs_blocked(k: Tensor, v: Tensor, begins: Tensor, mean_keys: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`patchkit.kernels.pack_runs`."""
    B, H, N, _ = k.shape
    row = begins.cumsum(-1) - 1  # which run each token is in
    rows = int(row[..., -1].max()) + 1 if N else 0
    counts = torch.zeros(B, H, rows, dtype=torch.int32, device=k.device)
    counts.scatter_add_(2, row, torch.ones((), dtype=torch.int32, device=k.device).expand(B, H, N))
    share = counts.clamp_min(1).unsqueeze(-1)
    values = _sums(v, row, rows).div_(share).to(v.dtype)
    if mean_keys:
        return _sums(k, row, rows).div_(share).to(k.dtype), values, counts
    at = torch.zeros(B, H, rows, dtype=torch.long, device=k.device)
    sample, head, token = begins.nonzero(as_tuple=True)
    at[sample, head, row[sample, head, token]] = token
    keys = k.gather(2, at.unsqueeze(-1).expand(-1, -1, -1, k.shape[-1]))
    return keys.masked_fill_((counts == 0).unsqueeze(-1), 0), values, counts


def _sums(x: Tensor, row: Tensor, rows: int) -> Tensor:
    """Sum of the rows of each run, fp32, in the order of the tokens on a CPU."""
    out = torch.zeros(*x.shape[:2], rows, x.shape[-1], dtype=torch.float32, device=x.device)
    return out.scatter_add_(2, row.unsqueeze(-1).expand(x.shape), x.float())
