"""Constructors of :class:`BlockLayout`, from masks, predicates, masses and FlexAttention; the work is in ``build``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .rules import ElementRule, unpack_bits

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from .block_layout import BlockLayout


class Constructors:
    """The ``from_*`` methods of :class:`BlockLayout`."""

    @classmethod
    def from_bool(
        cls,
        keep: Tensor,
        *,
        block_q: int,
        block_k: int,
        q_len: int,
        kv_len: int,
        rule: ElementRule | None = None,
        kv_lens: Tensor | None = None,
    ) -> BlockLayout:
        """From kept blocks ``keep`` (B', H', Nq, Nk) or (Nq, Nk) bool.

        With an element ``rule``, kept blocks it allows only in part become partial and those it forbids are dropped.
        """
        from .build import from_bool

        return from_bool(keep, block_q, block_k, q_len, kv_len, rule, kv_lens)

    @classmethod
    def from_bits(
        cls,
        bits: Tensor,
        *,
        block_q: int,
        block_k: int,
        q_len: int,
        kv_len: int,
        kv_lens: Tensor | None = None,
    ) -> BlockLayout:
        """From the int64 words (B', H', Nq, ceil(Nk / 64)) that :meth:`to_bits` wrote."""
        keep = unpack_bits(bits, -(-kv_len // block_k))
        return cls.from_bool(keep, block_q=block_q, block_k=block_k, q_len=q_len, kv_len=kv_len, kv_lens=kv_lens)

    @classmethod
    def from_topk(
        cls,
        W: Tensor,
        k_per_head: int | Tensor,
        forced: Tensor | None = None,
        *,
        block_q: int,
        block_k: int,
        q_len: int,
        kv_len: int,
        kv_lens: Tensor | None = None,
        k_max: int | None = None,
    ) -> BlockLayout:
        """Each row keeps its ``k`` blocks of largest mass, plus the forced ones.

        Args:
            W: (B', H', Nq, Nk) block masses (see ``block_mass``).
            k_per_head: blocks per row: an int, or an integer tensor that broadcasts to (B', H').
            forced: bool, broadcastable to W: blocks always kept. They take no part in the ranking and do not count
                in ``k`` (AdaSpa: the budget covers video-video blocks, text blocks come on top).
            block_q: query rows per block.
            block_k: keys per block.
            q_len: number of queries.
            kv_len: number of keys.
            kv_lens: (B,) valid keys per sample; blocks past them are never kept.
            k_max: bound of ``k_per_head`` that is known to the host.

        Ties go to the lower index; a NaN mass ranks last. No sort of all blocks (see ``row_topk``). On an accelerator
        nothing waits for it, except once for ``forced``, and for a ``k_per_head`` that lives there without ``k_max``;
        lists and lengths are not read back to be checked.
        """
        from .select import from_topk

        return from_topk(W, k_per_head, forced, block_q, block_k, q_len, kv_len, kv_lens, k_max)

    @classmethod
    def from_predicate(
        cls,
        predicate: Callable[[Tensor, Tensor], Tensor],
        *,
        block_q: int,
        block_k: int,
        q_len: int,
        kv_len: int,
        rule: ElementRule | None = None,
        kv_lens: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> BlockLayout:
        """From a function of block indices.

        ``predicate(p, j)`` gets (Nq, 1) and (1, Nk) int64 and returns 0 (empty), 1 (partial) or 2 (full), or bool
        (kept), broadcast to (..., Nq, Nk). Partial blocks follow ``rule``, which is then required.
        """
        from .build import from_predicate

        return from_predicate(predicate, block_q, block_k, q_len, kv_len, rule, kv_lens, device)

    @classmethod
    def from_mask_mod(
        cls,
        mask_mod: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
        *,
        block_q: int,
        block_k: int,
        q_len: int,
        kv_len: int,
        batch: int = 1,
        heads: int = 1,
        kv_lens: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> BlockLayout:
        """From FlexAttention's ``mask_mod(b, h, q, k) -> bool``, any element pattern: partial blocks store row bits."""
        from .build import from_mask_mod

        return from_mask_mod(mask_mod, block_q, block_k, q_len, kv_len, batch, heads, kv_lens, device)

    @classmethod
    def from_segments(
        cls,
        q_seg: Tensor,
        kv_seg: Tensor,
        *,
        block_q: int,
        block_k: int,
        causal_offset: int | None = None,
        kv_lens: Tensor | None = None,
    ) -> BlockLayout:
        """Queries see the keys of their own segment: ids (L,) or (B, L), negative for padding; optionally causal."""
        from .build import from_bool

        q_len, kv_len = q_seg.shape[-1], kv_seg.shape[-1]
        keep = torch.ones(-(-q_len // block_q), -(-kv_len // block_k), dtype=torch.bool, device=q_seg.device)
        rule = ElementRule(causal_offset, q_seg, kv_seg)
        return from_bool(keep, block_q, block_k, q_len, kv_len, rule, kv_lens)

    @classmethod
    def from_flex(cls, block_mask: BlockMask) -> BlockLayout:
        """From a FlexAttention ``BlockMask``; its partial blocks are evaluated once and stored as row bits."""
        from .flex import from_flex

        return from_flex(block_mask)
