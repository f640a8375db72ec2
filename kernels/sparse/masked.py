"""Short sequences: one dense call under the expanded mask. It computes every pair, and is named accordingly."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dense import dense_attention
from ..layout import BlockLayout


def all_finite(*tensors: Tensor) -> bool:
    """Whether no element is NaN or infinite: a masked dense call multiplies dropped values by 0, which keeps NaN."""
    return all(bool(torch.isfinite(x).all()) for x in tensors)


def masked_dense(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float) -> tuple[Tensor, Tensor]:
    """Same result as the blocked path where k and v are finite; O(q_len * kv_len) mask memory."""
    return dense_attention(q, k, v, mask=layout.element_mask(), scale=scale, return_lse=True, enable_gqa=True)


def unmasked_dense(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float) -> tuple[Tensor, Tensor]:
    """The layout keeps everything: plain dense attention on the valid keys of each sample."""
    lens = None if layout.kv_lens is None else [int(n) for n in layout.kv_lens.tolist()]
    if lens is None or len(set(lens)) == 1:
        n = layout.kv_len if lens is None else lens[0]
        return dense_attention(q, k[:, :, :n], v[:, :, :n], scale=scale, return_lse=True, enable_gqa=True)
    parts = [
        dense_attention(
            q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n], scale=scale, return_lse=True, enable_gqa=True
        )
        for b, n in enumerate(lens)
    ]
    return torch.cat([o for o, _ in parts]), torch.cat([lse for _, lse in parts])
