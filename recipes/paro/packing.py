"""Bool masks as bits in 32-bit words."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WORD = 32


def pack(mask: Tensor) -> Tensor:
    """Bool (..., n) to int32 (..., ceil(n / 32)); bit i of word w is entry 32 w + i."""
    padded = F.pad(mask, (0, -mask.shape[-1] % WORD)).unflatten(-1, (-1, WORD))
    shift = torch.arange(WORD, dtype=torch.int64, device=mask.device)
    words = (padded.to(torch.int64) << shift).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack(words: Tensor, n: int) -> Tensor:
    """Inverse of :func:`pack`."""
    shift = torch.arange(WORD, dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(-1) >> shift) & 1).bool().flatten(-2)[..., :n]
