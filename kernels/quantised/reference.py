"""Quantised attention as the formulas read: one query block after the other, one key block after the other, fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import BlockLayout
from .formats import K_GROUP, LARGEST, LARGEST_FP8, LN2, LOG2E, P_ROWS, Format, fp8, rounded, scale_of
from .operands import groups_of, keys_of, values_of


def quantised_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    form: Format,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the kept blocks with rounded operands; see :class:`Format` for what is rounded and how.

    Args:
        q: (B, H, q_len, D).
        k: (B, Hkv, kv_len, D).
        v: as ``k``.
        layout: full blocks only.
        form: the number formats.
        scale: logit scale, default 1 / sqrt(D).

    Returns:
        Output (B, H, q_len, D) in q's dtype and natural-log LSE (B, H, q_len) fp32 of the unsmoothed logits.
    """
    B, H, N, D = q.shape
    scale = D**-0.5 if scale is None else scale
    group = H // k.shape[1]
    lens = [layout.kv_len] * B if layout.kv_lens is None else layout.kv_lens.tolist()
    groups = groups_of(layout.block_q, layout.block_k)
    logits = _logits(q, k, form, groups, scale, lens)
    values = None if form.pv == "none" else values_of(v, form, lens)
    kept = layout.to_bool().expand(B, H, -1, -1)
    rows, keys = min(P_ROWS, layout.block_q), min(K_GROUP, layout.block_k)
    out, lse = torch.zeros(B, H, N, D), torch.full((B, H, N), float("-inf"))
    for b in range(B):
        for h in range(H):
            used = v[b, h // group].float() if values is None else values.v[b, h // group]
            for top in range(0, N, rows):
                here = slice(top, min(N, top + rows))
                places = kept[b, h, top // layout.block_q].nonzero().flatten().tolist()
                parts = [
                    slice(at, min(lens[b], at + keys))
                    for j in places
                    for at in range(j * layout.block_k, min(lens[b], (j + 1) * layout.block_k), keys)
                ]
                if parts:
                    out[b, h, here], lse[b, h, here] = _online(logits[b, h, here], used, parts, form)
    if values is not None:
        out = out * values.scale.repeat_interleave(group, 1)[:, :, None]
        if values.mean is not None:
            mean = values.mean.repeat_interleave(group, 1)[:, :, None]
            out = torch.where(lse.isneginf()[..., None], out, out + mean)
    shift = None if form.qk == "none" else keys_of(q, k, form, groups, scale, lens).shift
    return out.to(q.dtype), lse if shift is None else lse + shift


def _logits(q: Tensor, k: Tensor, form: Format, groups: tuple[int, int], scale: float, lens: list[int]) -> Tensor:
    """(B, H, q_len, kv_len) in base 2."""
    group = q.shape[1] // k.shape[1]
    if form.qk == "none":
        return (q.float() * (scale * LOG2E)) @ k.float().repeat_interleave(group, 1).transpose(-1, -2)
    made = keys_of(q, k, form, groups, scale, lens)
    dots = made.q.float() @ made.k.float().repeat_interleave(group, 1).transpose(-1, -2)
    dots = dots * made.q_scale.repeat_interleave(groups[0], -1)[..., None]
    dots = dots * made.k_scale.repeat_interleave(group, 1).repeat_interleave(groups[1], -1)[..., None, :]
    return dots[:, :, : q.shape[2], : k.shape[2]]


def _online(logits: Tensor, v: Tensor, parts: list[slice], form: Format) -> tuple[Tensor, Tensor]:
    """Online softmax over blocks of keys; P is rounded against the maximum so far, its sum is not."""
    m = torch.full(logits.shape[:1], float("-inf"))
    total, acc = torch.zeros_like(m), torch.zeros(logits.shape[0], v.shape[-1])
    for part in parts:
        s = logits[:, part]
        top = torch.maximum(m, s.amax(-1))
        p, alpha = (s - top[:, None]).exp2(), (m - top).exp2()
        total = total * alpha + p.sum(-1)
        acc = acc * alpha[:, None] + _product(p, v[part], form)
        m = top
    return acc / total[:, None], (m + total.log2()) * LN2


def _product(p: Tensor, v: Tensor, form: Format) -> Tensor:
    if form.pv == "none":
        return p @ v
    if form.pv == "fp8":
        return fp8(p * LARGEST_FP8) @ v / LARGEST_FP8
    top = LARGEST[form.pv]
    if form.p_scale == "static":
        return rounded(p, 1 / top, top) @ v / top
    step = scale_of(p.amax(-1, keepdim=True) if form.p_scale == "row" else p.amax(), top)
    return (rounded(p, step, top) @ v) * step
