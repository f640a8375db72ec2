"""Gathering of key and value blocks into buffers that are reused from chunk to chunk."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Slot(NamedTuple):
    """Views of the buffers for c rows of m blocks: where to gather to, and what to attend over."""

    raw_k: Tensor
    raw_v: Tensor
    k: Tensor
    v: Tensor


class Gather:
    """Copies listed blocks of k and v (kv, D) next to each other.

    The buffers are allocated once per call (a fresh allocation of this size per chunk costs page faults) and their
    views once per chunk shape: with tiles of a millisecond, each avoided Python-level call counts.

    Args:
        capacity: largest number of tokens gathered at once.
        like: a tensor with the head size, dtype and device of k and v.
        block: tokens per block.
        widen: gather into fp32 whatever the dtype of k and v.
    """

    def __init__(self, capacity: int, like: Tensor, block: int, widen: bool) -> None:
        self.dim, self.block, self.widen = like.shape[-1], block, widen
        self.dtype = torch.float32 if widen else like.dtype
        new = like.new_empty
        self.buffers = [new(capacity, self.dim, dtype=self.dtype) for _ in range(2)]
        self.staging = new(capacity, self.dim) if widen else None
        self.token = torch.arange(block, device=like.device)
        self.slots: dict[tuple[int, int, bool], Slot] = {}
        self.sources: tuple[Tensor, Tensor] | None = None
        self.whole = False

    def bind(self, k: Tensor, v: Tensor) -> None:
        """Gather from these k and v (kv, D) from now on."""
        # Complete blocks of a contiguous tensor are one memcpy each. For the heads of a (B, N, H, D) tensor, token by
        # token is faster than blocks of strided rows.
        self.whole = k.is_contiguous() and v.is_contiguous()
        if self.whole:
            n = k.shape[0] // self.block
            k, v = (x[: n * self.block].view(n, self.block, self.dim) for x in (k, v))
        self.sources = (k, v)

    def slot(self, c: int, m: int) -> Slot:
        """Buffer views for c rows of m blocks."""
        key = (c, m, self.whole)
        if key not in self.slots:
            n = c * m * self.block
            k, v = (x[:n] for x in self.buffers)
            raw = (k, v) if self.staging is None else (self.staging[:n], self.staging[:n])
            if self.whole:
                raw = (raw[0].view(-1, self.block, self.dim), raw[1].view(-1, self.block, self.dim))
            shape = (c, m * self.block, self.dim)
            self.slots[key] = Slot(*raw, k.view(shape), v.view(shape))
        return self.slots[key]

    def index(self, blocks: Tensor) -> Tensor:
        """What to select for the listed blocks (c, m) of the bound tensors: flat block or token numbers."""
        if self.whole:
            return blocks.reshape(-1)
        return (blocks.unsqueeze(-1) * self.block + self.token).reshape(-1)

    def fill(self, slot: Slot, index: Tensor) -> None:
        """Fill ``slot.k`` and ``slot.v``; they are valid until the next call."""
        assert self.sources is not None
        k, v = self.sources
        torch.index_select(k, 0, index, out=slot.raw_k)
        if self.widen:
            slot.k.view(slot.raw_k.shape).copy_(slot.raw_k)
        torch.index_select(v, 0, index, out=slot.raw_v)
        if self.widen:
            slot.v.view(slot.raw_v.shape).copy_(slot.raw_v)
