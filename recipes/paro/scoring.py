"""Choosing an order for each head from statistics of the blocks of its attention map."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Select = Literal["score", "kept_mass"]
EPS_AT = 17.5  # eps x tokens of the paper: 1e-3 at 17,500 tokens


def skippable(small: Tensor, block: int, sigma: float) -> Tensor:
    """M_sparse (...): the share of blocks (..., rows, columns) of which a share ``sigma`` of entries is small."""
    return (small >= sigma * block * block).to(torch.float32).mean((-1, -2))


def incoherence(total: Tensor, peak: Tensor, block: int) -> Tensor:
    """M_quant (...): largest over mean entry, averaged over the blocks that hold any mass; 1 where none does."""
    held = total > 0
    mean = total / (block * block)
    ratio = torch.where(held, peak / mean.clamp(min=1e-45), torch.zeros_like(peak))
    count = held.sum((-1, -2))
    return torch.where(count > 0, ratio.sum((-1, -2)) / count.clamp(min=1), torch.ones_like(count, dtype=ratio.dtype))


def kept_share(total: Tensor, density: float) -> Tensor:
    """Share (...) of the mass of blocks (..., rows, columns) that the heaviest ``density`` of them hold."""
    flat = total.flatten(-2)
    keep = max(1, round(density * flat.shape[-1]))
    return flat.topk(keep, dim=-1).values.sum(-1) / flat.sum(-1).clamp(min=1e-38)


def scores(sparse: Tensor, quant: Tensor, alpha: float) -> Tensor:
    """The lower the better, for candidates along the last dimension.

    alpha S / sum S + (1 - alpha) M_quant / sum M_quant with S = 1 - M_sparse. The paper prints M_sparse in the place of
    S, which prefers orders with fewer skippable blocks: a slip of the sign.
    """
    return alpha * _share(1 - sparse) + (1 - alpha) * _share(quant)


def _share(x: Tensor) -> Tensor:
    total = x.sum(-1, keepdim=True)
    return torch.where(total > 0, x / total.clamp(min=1e-38), torch.zeros_like(x))


def choose(sparse: Tensor, quant: Tensor, kept: Tensor, codes: tuple[int, ...], select: Select, alpha: float) -> Tensor:
    """uint8 (...): the order of each head from its candidates' figures (..., candidates); ties: the lower code."""
    value = scores(sparse, quant, alpha) if select == "score" else -kept
    # argmin leaves open which of several equals it takes
    best = (value == value.min(-1, keepdim=True).values).to(torch.uint8).cumsum(-1).clamp(max=1).eq(0).sum(-1)
    return torch.tensor(codes, dtype=torch.uint8, device=value.device)[best]
