"""Distances between two videos, in torch."""
from __future__ import annotations

import torch
from torch import Tensor


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """PSNR"""
    return -10 * torch.log10((a - b).square().mean())
