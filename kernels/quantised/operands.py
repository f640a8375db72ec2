"""Q, K and V as quantised attention multiplies them, in plain torch: the definition that the Triton pass is held to."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .formats import K_GROUP, LARGEST, LOG2E, Q_GROUP, Format, fp8, rounded, scale_of, top_of


class Keys(NamedTuple):
    """Rounded queries and keys, padded to whole groups with zeros.

    Attributes:
        q: (B, H, Nq', D) int8.
        q_scale: (B, H, groups) fp32; scale * log2(e) is in it, so that q k is a logit in base 2.
        k: (B, Hkv, Nk', D) int8.
        k_scale: (B, Hkv, blocks) fp32.
        shift: (B, H, q_len) fp32, what the mean of K took off each row of natural logits; None without smoothing.
    """

    q: Tensor
    q_scale: Tensor
    k: Tensor
    k_scale: Tensor
    shift: Tensor | None


class Values(NamedTuple):
    """Rounded values.

    Attributes:
        v: (B, Hkv, N, D) fp32, integers (or numbers of e4m3); 0 behind the last valid key.
        scale: (B, Hkv, D) fp32.
        mean: (B, Hkv, D) fp32, or None without smoothing.
    """

    v: Tensor
    scale: Tensor
    mean: Tensor | None


def groups_of(block_q: int, block_k: int) -> tuple[int, int]:
    """Tokens of a group of queries, and of one of keys."""
    return min(Q_GROUP, block_q), min(K_GROUP, block_k)


def mean_over(x: Tensor, lens: list[int] | None) -> Tensor:
    """(B, H, D) fp32 mean over the valid tokens of x (B, H, N, D); 0 where there is none. Makes no copy of x."""
    if lens is None:
        return torch.mean(x, 2, dtype=torch.float32) if x.shape[2] else x.new_zeros(*x.shape[:2], x.shape[3]).float()
    each = [torch.mean(s[:, :n], 1, dtype=torch.float32) if n else s.new_zeros(s.shape[0], s.shape[2]).float()
            for s, n in zip(x, lens, strict=True)]  # fmt: skip
    return torch.stack(each)


def extent_over(x: Tensor, mean: Tensor | None, lens: list[int] | None) -> Tensor:
    """(B, H, D) fp32: the largest |x - mean| of each channel over the valid tokens. Makes no copy of x."""
    parts = []
    for b in range(x.shape[0]):
        part = x[b] if lens is None else x[b, :, : lens[b]]
        if not part.shape[1]:
            parts.append(x.new_zeros(x.shape[1], x.shape[3], dtype=torch.float32))
            continue
        low, high = (edge.float() for edge in torch.aminmax(part, dim=1))
        middle = torch.zeros_like(low) if mean is None else mean[b]
        parts.append(torch.maximum((low - middle).abs(), (high - middle).abs()))
    return torch.stack(parts)


def valid_rows(x: Tensor, lens: list[int] | None) -> Tensor:
    """x in fp32 with zeros behind the last valid token, whatever stands there."""
    if lens is None:
        return x.float()
    here = torch.arange(x.shape[2], device=x.device) < torch.tensor(lens, device=x.device)[:, None]
    return x.float().masked_fill(~here[:, None, :, None], 0.0)


def grouped(x: Tensor, group: int, top: float) -> tuple[Tensor, Tensor]:
    """x (B, H, N, D) fp32 rounded by groups of tokens: int8 padded to whole groups, and scales (B, H, groups)."""
    padded = F.pad(x, (0, 0, 0, -x.shape[2] % group)).unflatten(2, (-1, group))
    scale = scale_of(padded.abs().amax((-1, -2)), top)
    return rounded(padded, scale[..., None, None], top).to(torch.int8).flatten(2, 3), scale


def keys_of(q: Tensor, k: Tensor, form: Format, groups: tuple[int, int], scale: float, lens: list[int] | None) -> Keys:
    """Rounded queries and keys. ``scale`` is that of the softmax."""
    top = LARGEST[form.qk]
    mean = mean_over(k, lens) if form.smooths_k else None
    keys = k.float() if mean is None else k.float() - mean[:, :, None]
    q8, q_scale = grouped(q.float() * (scale * LOG2E), groups[0], top)
    k8, k_scale = grouped(valid_rows(keys, lens), groups[1], top)
    return Keys(q8, q_scale, k8, k_scale, None if mean is None else shift_of(q, mean, scale))


def shift_of(q: Tensor, mean: Tensor, scale: float) -> Tensor:
    """(B, H, q_len): scale * q . mean, the part of each row's logits that smoothing takes off."""
    mean = mean.repeat_interleave(q.shape[1] // mean.shape[1], 1)
    return (q.float() @ mean.unsqueeze(-1)).squeeze(-1) * scale


def values_of(v: Tensor, form: Format, lens: list[int] | None) -> Values:
    """Rounded values."""
    top = top_of(form.pv)
    mean = mean_over(v, lens) if form.smooths_v else None
    scale = scale_of(extent_over(v, mean, lens), top)
    centred = v.float() if mean is None else v.float() - mean[:, :, None]
    centred = valid_rows(centred, lens)
    if form.pv == "fp8":
        return Values(fp8(centred / scale[:, :, None]), scale, mean)
    return Values(rounded(centred, scale[:, :, None], top), scale, mean)
