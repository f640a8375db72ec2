"""Element mode: scores from sparse changes of the keys, emulated as the authors' own evaluation does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchkit import kernels
from patchkit.context import AttentionCall
from patchkit.recipes.deltallm.masks import additive, visible
from patchkit.recipes.deltallm.windows import SMALLEST, Window

ROWS = 256  # queries whose scores are held at a time


def compute(call: AttentionCall, layer: Any, theta: float, window: Window, sink: int) -> Tensor:
    """Scores from the true keys where they are exact and from the filtered ones elsewhere; one softmax; true values.

    Args:
        call: the attention op; its keys are all that the queries may see.
        layer: the cache's layer that keeps the filtered keys, or None without one.
        theta: threshold of an element's change.
        window: what stays exact.
        sink: first tokens, which stay exact.

    Returns:
        (B, H, Nq, Dv) in the dtype of the queries. Notes the sparsity.
    """
    k, n = call.k, call.q.shape[2]
    total = k.shape[2] if layer is None else layer.get_seq_length()
    starts = layer.starts if layer is not None and layer.starts is not None else _starts(call)
    begin = torch.tensor(starts, device=k.device)
    if layer is None:
        hat, kept = kernels.dead_band(k, theta, start=begin)
        kept, scanned, prompt = kept.sum(-1), k.shape[2], total
    else:
        layer.starts = starts
        layer.prompt = total if n > 1 or not layer.prompt else layer.prompt
        hat, kept, scanned = layer.scan(k, theta, begin)
        prompt = layer.prompt
    widths = [_width(window, prompt - s, total - s, n) for s in starts]
    out = _attend(call, hat, starts, widths, total, window, sink)
    _note(call, kept, scanned, starts, widths, total)
    return out


def _starts(call: AttentionCall) -> list[int]:
    """First key of each sample that some query sees."""
    if call.mask is None:
        return [0] * call.q.shape[0]
    seen = visible(call.mask).any(-2)[:, 0]
    first = torch.where(seen.any(-1), seen.float().argmax(-1), 0)
    found: list[int] = first.expand(call.q.shape[0]).tolist()
    return found


def _width(window: Window, prompt: int, tokens: int, queries: int) -> int:
    """W: of all tokens in a prefill; when decoding of the prompt, and at least 16 if it is a share."""
    if queries > 1:
        return window.width(tokens)
    width = window.width(prompt)
    return width if isinstance(window.size, int) else max(SMALLEST, width)


def _attend(
    call: AttentionCall, hat: Tensor, starts: list[int], widths: list[int], total: int, window: Window, sink: int
) -> Tensor:
    q, n, device = call.q, call.q.shape[2], call.q.device
    scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
    k, hat, v = (x.float().unsqueeze(2) for x in (call.k, hat, call.v))  # [B, Hkv, 1, T, D]
    begin = torch.tensor(starts, device=device).view(-1, 1, 1)
    width = torch.tensor(widths, device=device).view(-1, 1, 1)
    keys = torch.arange(total - k.shape[3], total, device=device) - begin  # [B, 1, T], counted from the first token
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    for low in range(0, n, ROWS):
        rows = slice(low, min(n, low + ROWS))
        at = torch.arange(total - n + rows.start, total - n + rows.stop, device=device).view(1, -1, 1) - begin
        exact = (keys < sink) | _near(at, keys, width, window)
        part = q[:, :, rows].float().unflatten(1, (call.k.shape[1], -1))  # [B, Hkv, G, rows, D]
        s = torch.where(exact[:, None, None], part @ k.transpose(-1, -2), part @ hat.transpose(-1, -2)) * scale
        if call.mask is not None:
            s = s + _mask_rows(call.mask, rows, call.k.shape[1])
        elif n > 1:
            s = s.masked_fill((keys > at)[:, None, None], float("-inf"))
        p = torch.softmax(s, -1).masked_fill((s == float("-inf")).all(-1, keepdim=True), 0)
        out[:, :, rows] = (p @ v).flatten(1, 2).to(q.dtype)
    return out


def _near(at: Tensor, keys: Tensor, width: Tensor, window: Window) -> Tensor:
    if window.kind == "sliding":
        return at - keys < width
    size = width.clamp_min(1)
    return (at.div(size, rounding_mode="floor") == keys.div(size, rounding_mode="floor")) & (width > 0)


def _mask_rows(mask: Tensor, rows: slice, kv_heads: int) -> Tensor:
    """Some rows of a mask, to be added to scores (B, Hkv, G, rows, T)."""
    part = additive(mask if mask.shape[-2] == 1 else mask[..., rows, :])
    return part.unsqueeze(2) if part.shape[1] == 1 else part.unflatten(1, (kv_heads, -1))


def _note(call: AttentionCall, kept: Tensor, scanned: int, starts: list[int], widths: list[int], total: int) -> None:
    """The paper's count: share of changes that are exactly 0, over all rows, times the share outside the window."""
    device = kept.device
    rows = torch.tensor([scanned - s for s in starts], device=device).clamp_min(1).view(-1, 1)
    tokens = torch.tensor([total - s for s in starts], device=device).clamp_min(1).view(-1, 1)
    zeros = 1 - kept / (rows * call.k.shape[-1])
    outside = (1 - torch.tensor(widths, device=device).view(-1, 1) / tokens).clamp_min(0)
    call.ledger.note(sparsity=zeros * outside, unchanged=zeros)
