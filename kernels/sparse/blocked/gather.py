"""Gathering of key and value blocks into buffers that are reused from chunk to chunk."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Slot(NamedTuple):
    """Views of the buffers for c tiles of m blocks: where to gather to, and what to multiply (``tokens`` keys each)."""

    raw_k: Tensor
    raw_v: Tensor
    k: Tensor
    k_t: Tensor
    v: Tensor
    logits: Tensor


class Gather:
    """Buffers for the gathered blocks of a chunk and its logits.

    They are allocated once per thread and call (a fresh allocation of this size per chunk costs page faults) and their
    views once per chunk shape: with chunks of a millisecond, each avoided Python-level call counts.

    Args:
        capacity: largest number of blocks gathered at once.
        like: a tensor with the head size, dtype and device of k and v.
        block_q: rows per tile.
        block_k: keys per block.
    """

    def __init__(self, capacity: int, like: Tensor, block_q: int, block_k: int) -> None:
        self.block_q, self.block_k = block_q, block_k
        dim = like.shape[-1]
        self.k, self.v = (like.new_empty(capacity, block_k, dim) for _ in range(2))
        self.logits = like.new_empty(capacity * block_k * block_q)
        self.slots: dict[tuple[int, int, int], Slot] = {}

    def slot(self, c: int, m: int, tokens: int) -> Slot:
        """Buffer views for c tiles of m blocks that hold ``tokens`` keys."""
        key = (c, m, tokens)
        if key not in self.slots:
            raw_k, raw_v = self.k[: c * m], self.v[: c * m]
            k, v = (x.view(c, m * self.block_k, -1)[:, :tokens] for x in (raw_k, raw_v))
            logits = self.logits[: c * self.block_q * tokens].view(c, self.block_q, tokens)
            self.slots[key] = Slot(raw_k, raw_v, k, k.transpose(1, 2), v, logits)
        return self.slots[key]
