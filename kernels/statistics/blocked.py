"""Statistics of the blocks of an attention map in plain torch: bands of rows, reduced at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..threads import for_each
from .reference import statistics_of_map

# Entries of the map held at a time.
TILE, DEVICE_TILE = 512 * 1024, 64 * 2**20


def block_statistics_blocked(
    q: Tensor, k: Tensor, lse: Tensor, block: int, eps: float, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`patchkit.kernels.block_statistics`."""
    B, H, q_len, _ = q.shape
    group, kv_len = H // k.shape[1], k.shape[2]
    found = torch.zeros(3, B, H, -(-q_len // block), -(-kv_len // block), dtype=torch.float32, device=q.device)
    entries = TILE if q.device.type == "cpu" else DEVICE_TILE
    step_q = max(1, min(q_len, 512) // block) * block
    step_k = max(1, entries // step_q // block) * block
    bands = [(b, h, at) for b in range(B) for h in range(H) for at in range(0, q_len, step_q)]

    def make_worker() -> Callable[[tuple[int, int, int]], None]:
        return work

    def work(band: tuple[int, int, int]) -> None:
        b, h, at = band
        rows = slice(at, min(q_len, at + step_q))
        queries, shift = q[b, h, rows].float() * scale, lse[b, h, rows].float().unsqueeze(-1)
        for left in range(0, kv_len, step_k):
            p = queries @ k[b, h // group, left : left + step_k].float().T
            parts = statistics_of_map(p.sub_(shift).exp_(), block, eps)
            top, side = at // block, left // block
            for target, part in zip(found, parts, strict=True):
                target[b, h, top : top + part.shape[0], side : side + part.shape[1]] = part

    for_each(bands, make_worker, q.device)
    return found[0], found[1], found[2]
