"""The layout of a dense call: every row complete, so that lists are implicit and hold nothing."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..layout import BlockLayout

BLOCK_Q, BLOCK_K = 128, 64


class PlainSizes:
    """What the checks of an operator ask of a layout, for a dense call that needs none."""

    batch = heads = 1
    q_seg = kv_seg = None

    def __init__(self, q: Tensor, k: Tensor, kv_lens: Tensor | None) -> None:
        self.q_len, self.kv_len = q.shape[-2], k.shape[-2]
        self.device, self.kv_lens = q.device, kv_lens


@functools.lru_cache(maxsize=64)
def _complete(q_len: int, kv_len: int, device: torch.device) -> BlockLayout:
    return _made(q_len, kv_len, torch.tensor([-(-kv_len // BLOCK_K)], dtype=torch.int32, device=device), None)


def _made(q_len: int, kv_len: int, blocks: Tensor, kv_lens: Tensor | None) -> BlockLayout:
    n_q = -(-q_len // BLOCK_Q)
    num = blocks.to(torch.int32).view(-1, 1, 1).expand(-1, 1, n_q).contiguous()
    idx = torch.zeros(*num.shape, 1, dtype=torch.int32, device=num.device)
    return BlockLayout(BLOCK_Q, BLOCK_K, q_len, kv_len, idx, num, kv_lens=kv_lens).assured()


def dense_layout(q: Tensor, k: Tensor, kv_lens: Tensor | None) -> BlockLayout:
    """All keys, or the first ``kv_lens`` (B,) of each sample."""
    if kv_lens is None:
        return _complete(q.shape[2], k.shape[2], k.device)
    lens = kv_lens.to(k.device, torch.int32, copy=True)  # the caller may write to theirs
    return _made(q.shape[2], k.shape[2], (lens + BLOCK_K - 1) // BLOCK_K, lens)
