"""Attention over packed runs and exact keys as the formula reads: one softmax over both, fp32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..runs import Packed


def packed_attention_reference(
    q: Tensor,
    packed: Packed,
    used: Tensor,
    k: Tensor,
    v: Tensor,
    exact_from: Sequence[int],
    *,
    chunk: int,
    first: int,
    scale: float | None = None,
) -> Tensor:
    """out = (sum_j c_j e^{s_j} vbar_j + sum_n e^{s_n} v_n) / (sum_j c_j e^{s_j} + sum_n e^{s_n}), quadratic memory.

    For arguments and the meaning of each see :func:`patchkit.kernels.packed_attention`. Returns (B, H, L, Dv) fp32.
    """
    _, H, L, D = q.shape
    group = H // k.shape[1]
    scale = D**-0.5 if scale is None else scale
    begin = first + L - k.shape[2]

    def heads(x: Tensor) -> Tensor:
        return x.float().repeat_interleave(group, dim=1)

    position = torch.arange(first, first + L)
    block = position // chunk - first // chunk
    rows = used[block].permute(1, 2, 0).repeat_interleave(group, dim=1)  # [B, H, L]
    bias = packed.counts.float().log().repeat_interleave(group, dim=1).unsqueeze(2)  # log 0 is -inf
    s1 = q.float() @ heads(packed.keys).transpose(-1, -2) * scale + bias
    s1 = s1.masked_fill(torch.arange(s1.shape[-1]) >= rows.unsqueeze(-1), float("-inf"))
    s2 = q.float() @ heads(k).transpose(-1, -2) * scale
    at = torch.arange(begin, first + L)
    seen = (at >= torch.tensor(list(exact_from))[block].unsqueeze(-1)) & (at <= position.unsqueeze(-1))
    s2 = s2.masked_fill(~seen, float("-inf"))
    p = torch.cat([s1, s2], -1).softmax(-1)
    return p @ torch.cat([heads(packed.values), heads(v)], 2)
