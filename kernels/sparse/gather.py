"""Gathering of key and value blocks into buffers that are reused from chunk to chunk."""

from __future__ import annotations

import torch
from torch import Tensor


class Gather:
    """Copies listed blocks of k and v (kv, D) next to each other.

    The buffers are allocated once per call: a fresh allocation of this size per chunk costs page faults, measured at a
    tenth of the whole run time.

    Args:
        capacity: largest number of tokens gathered at once.
        like: a tensor with the head size, dtype and device of k and v.
        block: tokens per block.
        widen: gather into fp32 whatever the dtype of k and v.
    """

    def __init__(self, capacity: int, like: Tensor, block: int, widen: bool) -> None:
        d, device = like.shape[-1], like.device
        self.dtype = torch.float32 if widen else like.dtype
        self.block = block
        self.out = [torch.empty(capacity, d, dtype=self.dtype, device=device) for _ in range(2)]
        self.raw = torch.empty(capacity, d, dtype=like.dtype, device=device) if widen else None
        self.token = torch.arange(block, device=device)

    def __call__(self, k: Tensor, v: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Blocks (c, m) of k and v as (c, m * block, D) each; valid until the next call. All blocks are complete."""
        c, m = blocks.shape
        n = c * m * self.block
        found = []
        tokens: Tensor | None = None
        for x, out in zip((k, v), self.out, strict=True):
            target = out[:n]
            raw = target if self.raw is None else self.raw[:n]
            if x.is_contiguous():
                # Whole blocks are one memcpy each.
                whole = x[: x.shape[0] // self.block * self.block].unflatten(0, (-1, self.block))
                torch.index_select(whole, 0, blocks.reshape(-1), out=raw.view(-1, self.block, x.shape[-1]))
            else:
                # Heads of a (B, N, H, D) tensor: row by row is faster than blocks of strided rows.
                tokens = (blocks.unsqueeze(-1) * self.block + self.token).flatten() if tokens is None else tokens
                torch.index_select(x, 0, tokens, out=raw)
            if raw is not target:
                target.copy_(raw)
            found.append(target.view(c, m * self.block, -1))
        return found[0], found[1]
