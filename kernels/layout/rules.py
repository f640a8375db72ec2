"""Element rules: which (query, key) pairs inside a *partial* block may attend.

A rule is the conjunction of up to three parts, all optional: a causal diagonal, equal segment ids, and stored bits.
Bits are held one ``int64`` word per query row and 64 keys, so any block size is representable:
``part_bits[..., i, w]`` bit ``n`` tells whether row ``i`` of the block may see key ``64 * w + n`` of the block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

WORD = 64


@dataclass(frozen=True, eq=False)
class ElementRule:
    """A compact element mask, evaluated wherever a block is only partly allowed.

    Args:
        causal_offset: key ``n`` is allowed for query ``i`` iff ``n <= i + causal_offset``; None for no diagonal.
            ``kv_len - q_len`` aligns the last query with the last key.
        q_seg: integer segment ids of the queries, (q_len,) or (B, q_len); negative ids attend to nothing.
        kv_seg: integer segment ids of the keys, (kv_len,) or (B, kv_len); a pair is allowed iff the ids are equal.
    """

    causal_offset: int | None = None
    q_seg: Tensor | None = None
    kv_seg: Tensor | None = None

    @property
    def batch(self) -> int:
        """Number of distinct samples the rule describes (1 when it is the same for all)."""
        return 1 if self.q_seg is None or self.q_seg.dim() == 1 else self.q_seg.shape[0]

    def pairs(self, b: int, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        """Evaluate the rule for sample ``b`` on broadcastable integer positions; returns a bool tensor."""
        ok = torch.ones(torch.broadcast_shapes(q_pos.shape, k_pos.shape), dtype=torch.bool, device=q_pos.device)
        if self.causal_offset is not None:
            ok &= k_pos <= q_pos + self.causal_offset
        if self.q_seg is not None and self.kv_seg is not None:
            q_ids, k_ids = (pick_sample(seg, b) for seg in (self.q_seg, self.kv_seg))
            qs = q_ids[q_pos.clamp(max=q_ids.numel() - 1)]
            ks = k_ids[k_pos.clamp(max=k_ids.numel() - 1)]
            ok &= (qs == ks) & (qs >= 0)
        return ok


def pick_sample(x: Tensor, b: int) -> Tensor:
    """Row ``b`` of a per-sample tensor, or the whole of one shared by all samples."""
    if x.dim() == 1:
        return x
    return x[b if x.shape[0] > 1 else 0]


def pack_bits(mask: Tensor) -> Tensor:
    """Pack the last dimension of a bool tensor (..., n) into int64 words (..., ceil(n / 64))."""
    n = mask.shape[-1]
    words = -(-n // WORD)
    padded = torch.nn.functional.pad(mask, (0, words * WORD - n)).unflatten(-1, (words, WORD))
    shift = torch.arange(WORD, device=mask.device, dtype=torch.int64)
    # Distinct powers of two add without carry; the 64th wraps to the sign bit, which is what we want.
    return (padded.to(torch.int64) << shift).sum(-1)


def unpack_bits(words: Tensor, n: int) -> Tensor:
    """Inverse of :func:`pack_bits`: int64 (..., w) to bool (..., n), n <= 64 * w."""
    shift = torch.arange(WORD, device=words.device, dtype=torch.int64)
    return ((words.unsqueeze(-1) >> shift) & 1).bool().flatten(-2)[..., :n]
