"""Attention over packed runs and exact keys in plain torch: one query block after the other, both parts merged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dense.library import FLASH, cpu_flash, dense_with_lse
from ..merge import merge_states
from ..runs import Packed


def packed_attention_blocked(
    q: Tensor,
    packed: Packed,
    used: Tensor,
    k: Tensor,
    v: Tensor,
    exact_from: Sequence[int],
    chunk: int,
    first: int,
    scale: float,
) -> Tensor:
    """See :func:`patchkit.kernels.packed_attention`."""
    L, total = q.shape[2], k.shape[2]
    begin = first + L - total
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    bias = packed.counts.float().log()  # log 0 is -inf: such a row weighs nothing
    longest = used.flatten(1).amax(1).tolist() if used.numel() else [0] * len(exact_from)
    masks: dict[tuple[int, int], Tensor] = {}
    done = _dense_prefix(exact_from, longest, chunk, first, L)
    if done:  # a long prompt's first blocks that see no run are one causal call
        keys = slice(first - begin, first - begin + done)
        out[:, :, :done] = _exact(q[:, :, :done], k[:, :, keys], v[:, :, keys], scale, masks)[0]
    for block, start in enumerate(exact_from):
        if (first // chunk + block + 1) * chunk <= first + done:
            continue
        low = max(first, (first // chunk + block) * chunk) - first
        high = min(first + L, (first // chunk + block + 1) * chunk) - first
        rows = q[:, :, low:high]
        exact = slice(start - begin, high + total - L)
        result, lse = _exact(rows, k[:, :, exact], v[:, :, exact], scale, masks)
        if longest[block]:
            other, weight = _runs(rows, packed, bias, used[block], longest[block], scale)
            result, _ = merge_states(result, lse, other, weight)
        out[:, :, low:high] = result
    return out


def _dense_prefix(exact_from: Sequence[int], longest: Sequence[int], chunk: int, first: int, queries: int) -> int:
    """How many queries, in whole blocks from the first one on, see all keys from the first query's on and no others."""
    blocks = 0
    while blocks < len(exact_from) and exact_from[blocks] == first and not longest[blocks]:
        blocks += 1
    # A last block that is cut short is left to the loop.
    return min(blocks, queries // chunk) * chunk if blocks > 1 and first % chunk == 0 else 0


def _exact(
    q: Tensor, k: Tensor, v: Tensor, scale: float, masks: dict[tuple[int, int], Tensor]
) -> tuple[Tensor, Tensor]:
    """Attention over the last keys up to the diagonal; ``masks`` keeps the diagonals of blocks of equal size."""
    n, m = q.shape[2], k.shape[2]
    if n == 1:
        out, lse = dense_with_lse(_grouped(q, k), k, v, None, scale, False)
        return out.reshape(*q.shape[:3], -1), lse.reshape(q.shape[:3])
    if n == m:
        return dense_with_lse(q, k, v, None, scale, True)
    if (n, m) not in masks:
        seen = torch.arange(m, device=q.device) <= torch.arange(m - n, m, device=q.device).unsqueeze(-1)
        masks[n, m] = torch.zeros(n, m, dtype=q.dtype, device=q.device).masked_fill_(~seen, float("-inf"))[None, None]
    return dense_with_lse(q, k, v, masks[n, m], scale, False)


def _runs(q: Tensor, packed: Packed, bias: Tensor, used: Tensor, m: int, scale: float) -> tuple[Tensor, Tensor]:
    """Attention over the first ``used`` (B, Hkv) packed rows: no diagonal, so the heads of a group are more rows."""
    rows = _grouped(q, packed.keys)
    over = torch.arange(m, device=q.device) >= used.unsqueeze(-1)
    weights = bias[:, :, :m].masked_fill(over, float("-inf")).unsqueeze(2).to(q.dtype)
    out, lse = _weighted(rows, packed.keys[:, :, :m], packed.values[:, :, :m], weights, scale)
    return out.reshape(*q.shape[:3], -1), lse.reshape(q.shape[:3])


def _weighted(q: Tensor, k: Tensor, v: Tensor, weights: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention under a bias (B, Hkv, 1, M) that all queries of a head share; heads without a row give 0 and -inf."""
    mask = weights.expand(-1, -1, q.shape[2], -1)
    if q.device.type == "cpu" and int(torch._fused_sdp_choice(q, k, v, mask, 0.0, False, scale=scale)) == FLASH:
        # Straight to the kernel: to look for empty rows in the expanded mask would cost as much as a product.
        out, lse = cpu_flash(q, k, v, mask, scale)
        empty = (weights == float("-inf")).all(-1)
        return out.masked_fill(empty.unsqueeze(-1), 0), lse.masked_fill(empty, float("-inf"))
    return dense_with_lse(q, k, v, mask, scale, False)


def _grouped(q: Tensor, k: Tensor) -> Tensor:
    """(B, H, L, D) as (B, Hkv, H / Hkv * L, D): a group's heads read the same keys."""
    return q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])
