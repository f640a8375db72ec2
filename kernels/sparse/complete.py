"""Layouts that keep everything: plain dense attention on the valid keys of each sample."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dense import dense_attention
from ..layout import BlockLayout


def complete_attention(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float) -> tuple[Tensor, Tensor]:
    """Output and LSE of a layout whose rows are all complete; see ``plan.keeps_everything``."""
    lens = layout.derived("kv_lens on the host", lambda: _host(layout.kv_lens))
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


def _host(kv_lens: Tensor | None) -> list[int] | None:
    return None if kv_lens is None else [int(n) for n in kv_lens.tolist()]
