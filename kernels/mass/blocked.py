"""Block mass in plain torch: tiles of logits that are reduced at once. Memory O(tile), one matmul and one exp2."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import EXPONENT_LIMIT

LOG2E = math.log2(math.e)
# Tile of logits: 256 rows keep the matmul near its peak, 1024 keys keep the tile (1 MiB) in cache on a CPU.
TILE_Q, TILE_K = 256, 1024
# An accelerator wants larger launches.
DEVICE_TILE_Q, DEVICE_TILE_K = 1024, 8192


def block_mass_blocked(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    block_q: int,
    block_k: int,
    kv_lens: Tensor | None,
    row_sum: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See :func:`patchkit.kernels.block_mass`; the row sums are an empty tensor unless ``row_sum``."""
    B, H, q_len, _ = q.shape
    group, kv_len = H // k.shape[1], k.shape[2]
    W = q.new_zeros(B, H, -(-q_len // block_q), -(-kv_len // block_k), dtype=torch.float32)
    sums = q.new_zeros((B, H, q_len) if row_sum else (0,), dtype=torch.float32)
    tile_q, tile_k = (TILE_Q, TILE_K) if q.device.type == "cpu" else (DEVICE_TILE_Q, DEVICE_TILE_K)
    step_q, step_k = max(1, tile_q // block_q) * block_q, max(1, tile_k // block_k) * block_k
    lens = [kv_len] * B if kv_lens is None else [int(n) for n in kv_lens.tolist()]
    buffer = torch.empty(step_q * step_k, dtype=torch.float32, device=q.device)
    for b in range(B):
        for h in range(H):
            for start in range(0, q_len, step_q):
                rows = slice(start, min(q_len, start + step_q))
                qs = q[b, h, rows].float() * (scale * LOG2E)
                # Rows without keys have LSE -inf; they count as 0, not as exp(+inf).
                shift = lse[b, h, rows].float().mul(-LOG2E)
                shift = shift.masked_fill(shift == float("inf"), float("-inf")).unsqueeze(-1)
                block_rows = slice(start // block_q, -(-rows.stop // block_q))
                for left in range(0, lens[b], step_k):
                    keys = k[b, h // group, left : min(lens[b], left + step_k)]
                    cols = slice(left // block_k, left // block_k - (-keys.shape[0] // block_k))
                    tile = buffer[: qs.shape[0] * keys.shape[0]].view(qs.shape[0], keys.shape[0])
                    total, per_row = _tile(qs, keys.float(), shift, tile, block_q, block_k, row_sum)
                    W[b, h, block_rows, cols] = total
                    if per_row is not None:
                        sums[b, h, rows] += per_row
    return W, sums


def _tile(
    qs: Tensor, keys: Tensor, shift: Tensor, tile: Tensor, block_q: int, block_k: int, row_sum: bool
) -> tuple[Tensor, Tensor | None]:
    """Masses of one tile. ``qs`` (r, D) is scaled to base 2, ``shift`` (r, 1) is -LSE in base 2."""
    # The LSE goes in as the matmul's addend: cheaper than a subtraction pass over the tile.
    tile.copy_(shift.expand_as(tile))
    torch.addmm(tile, qs, keys.t(), out=tile)
    tile.exp2_()
    total = _reduce(tile, block_q, block_k)
    # The exponent limit matters for a stale LSE only, so it is not a pass over every tile: an element beyond the limit
    # makes its block sum exceed it too, and only then the tile is computed again with the clamp.
    if not bool((total <= math.exp(EXPONENT_LIMIT)).all()):
        tile.copy_(shift.expand_as(tile))
        torch.addmm(tile, qs, keys.t(), out=tile)
        tile.clamp_(max=EXPONENT_LIMIT * LOG2E).exp2_()
        total = _reduce(tile, block_q, block_k)
    return total, tile.sum(-1) if row_sum else None


def _reduce(tile: Tensor, block_q: int, block_k: int) -> Tensor:
    """Sum (r, c) to (ceil(r / block_q), ceil(c / block_k)); rows first, they are the cheap direction in memory."""
    r, c = tile.shape
    whole = r // block_q * block_q
    parts = [tile[:whole].view(-1, block_q, c).sum(1)] if whole else []
    if whole < r:
        parts.append(tile[whole:].sum(0, keepdim=True))
    rows = parts[0] if len(parts) == 1 else torch.cat(parts)
    return F.pad(rows, (0, -c % block_k)).unflatten(-1, (-1, block_k)).sum(-1)
