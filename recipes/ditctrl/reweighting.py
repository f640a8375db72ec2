"""Attention in which some words count more or less, without an N x N tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from patchkit.context import AttentionCall
from patchkit.recipes.ditctrl.maps import columns, own_attention_of_all, video_of

Next = Callable[[AttentionCall], Tensor]
By = Literal["prob", "logit"]


def reweighted(call: AttentionCall, scales: Sequence[tuple[int, float]], by: By, next: Next) -> Tensor:
    """The op's output with the attention between some words and the video scaled, both ways.

    ``"prob"``: after the softmax and without making the rows sum up to one again, as the official code does: P[v, w] is
    multiplied by c_w for every video row v, and P[w, v] for every video column v of the word's own row. ``"logit"``:
    c_w is added to these entries before the softmax; another function, which keeps the rows' sums.

    In a cross-attention every row is a video row and there are no words' rows.

    Args:
        call: of a joint or cross-attention.
        scales: (place of a token in the text, its factor c).
        by: see above.
        next: the op.
    """
    if call.site.kind == "self":
        return next(call)
    start, count = (call.text.start, len(call.text)) if call.text is not None else (0, call.k.shape[2])
    # both halves of guidance, as the official code; where padding is cut off, the empty text has no such places
    scales = [(token, factor) for token, factor in scales if token < count]
    if not scales:
        return next(call)
    words = torch.tensor([start + token for token, _ in scales], device=call.q.device)
    factors = torch.tensor([factor for _, factor in scales], device=call.q.device)
    if by == "logit":
        return _by_logit(call, words, factors, next)
    return _by_probability(call, words, factors, next)


def _by_probability(call: AttentionCall, words: Tensor, factors: Tensor, next: Next) -> Tensor:
    """O_v += sum_w (c_w - 1) P[v, w] v_w for video rows; O_w += (c_w - 1) sum_v P[w, v] v_v for the words' rows."""
    out, lse = own_attention_of_all(call, next)
    result = out.float()
    cross = call.site.kind == "cross"
    video = slice(0, call.q.shape[2]) if cross or call.text is None else video_of(call.text, call.q.shape[2])
    excess = factors - 1
    here = columns(call.q[:, :, video], call.k[:, :, words], lse[:, :, video], call.scale) * excess
    added = here @ call.v[:, :, words].float()
    if cross:
        return (result + added).to(out.dtype)
    result = result.clone() if result is out else result
    back = columns(call.q[:, :, words], call.k[:, :, video], lse[:, :, words], call.scale)
    result[:, :, words] += (back @ call.v[:, :, video].float()) * excess[:, None]
    result[:, :, video] += added
    return result.to(out.dtype)


def _by_logit(call: AttentionCall, words: Tensor, factors: Tensor, next: Next) -> Tensor:
    """Adds c_w by one more channel of queries and keys, so that no mask of N x N is needed.

    Video queries get an indicator for each word there, and the word's key has c_w / scale in it. The few words' rows
    are computed by themselves, over keys whose video part is moved by c_w.
    """
    q, k, scale = call.q, call.k, call.scale if call.scale is not None else call.q.shape[-1] ** -0.5
    cross = call.site.kind == "cross"
    video = slice(0, q.shape[2]) if cross or call.text is None else video_of(call.text, q.shape[2])
    flag_q = q.new_zeros(*q.shape[:3], 8)  # kernels want multiples of 8 channels
    flag_q[:, :, video, 0] = 1
    flag_k = k.new_zeros(*k.shape[:3], 8)
    flag_k[:, :, words, 0] = (factors / scale).to(k.dtype)
    wide = torch.cat([call.v, call.v.new_zeros(*call.v.shape[:3], 8)], -1)
    given = call.replace(q=torch.cat([q, flag_q], -1), k=torch.cat([k, flag_k], -1), v=wide, scale=scale)
    out = next(given)[..., : call.v.shape[-1]]
    if cross:
        return out
    result = out.clone()
    bias = torch.zeros(1, 1, words.numel(), k.shape[2], dtype=q.dtype, device=q.device)
    bias[..., video] = factors.to(q.dtype)[:, None]
    mask = call.mask
    if mask is not None:
        mask = mask[:, :, words] if mask.shape[-2] not in (1,) else mask
        blocked = ~mask if mask.dtype == torch.bool else None
        bias = bias.masked_fill(blocked, float("-inf")) if blocked is not None else bias + mask
    rows = call.replace(q=q[:, :, words], mask=bias, scale=scale, grid=None, text=None)
    result[:, :, words] = next(rows)
    return result
