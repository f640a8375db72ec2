"""Constructors of :class:`BlockLayout`: from masks, predicates and element rules to index lists."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import layout_error
from ..topk import index_dtype
from .rules import ElementRule, pack_bits

if TYPE_CHECKING:
    from .block_layout import BlockLayout

WHERE = "BlockLayout"


def row_lists(keep: Tensor, complete: int) -> tuple[Tensor, Tensor]:
    """Lists of one head: ``keep`` (Nq, Nk) bool to idx (Nq, K) ascending, num (Nq,) int32.

    Rows with ``complete`` blocks are implicit and take no room in idx (pass -1 to list every row).
    """
    num = keep.sum(-1, dtype=torch.int32)
    stored = num.masked_fill(num == complete, 0)
    width = max(1, int(stored.max())) if num.numel() else 1
    idx = torch.zeros(keep.shape[0], width, dtype=index_dtype(keep.shape[1]), device=keep.device)
    rows, cols = (keep & (stored > 0).unsqueeze(-1)).nonzero(as_tuple=True)
    start = stored.cumsum(0) - stored
    slot = torch.arange(rows.numel(), device=keep.device) - start.to(torch.int64)[rows]
    idx[rows, slot] = cols.to(idx.dtype)
    return idx, num


def stack_lists(lists: Sequence[tuple[Tensor, Tensor]], batch: int, heads: int) -> tuple[Tensor, Tensor]:
    """Stack the per-head lists (batch-major) into (B', H', Nq, K) and (B', H', Nq), padded to the longest."""
    width = max(idx.shape[-1] for idx, _ in lists)
    idx = torch.stack([torch.nn.functional.pad(i, (0, width - i.shape[-1])) for i, _ in lists])
    num = torch.stack([n for _, n in lists])
    return idx.unflatten(0, (batch, heads)), num.unflatten(0, (batch, heads))


def valid_per_sample(kv_len: int, block_k: int, kv_lens: Tensor | None) -> list[int]:
    """Valid key blocks of each sample; one entry when all samples agree."""
    if kv_lens is None:
        return [-(-kv_len // block_k)]
    lens = [int(n) for n in kv_lens.tolist()]
    if not lens or min(lens) < 0 or max(lens) > kv_len:
        raise layout_error(f"kv_lens must lie in 0..{kv_len}, got {lens}", WHERE, "Give the valid keys per sample.")
    blocks = [-(-n // block_k) for n in lens]
    return blocks[:1] if len(set(blocks)) == 1 else blocks


def pick(x: Tensor, b: int, h: int) -> Tensor:
    """(Nq, Nk) slice of a tensor (B', H', Nq, Nk) with broadcast leading dimensions."""
    return x[b if x.shape[0] > 1 else 0, h if x.shape[1] > 1 else 0]


def as_four(x: Tensor, shape: tuple[int, int], what: str) -> Tensor:
    """View ``x`` (..., Nq, Nk) with up to two leading dimensions as four-dimensional; check its last two sizes."""
    if x.dim() not in (2, 3, 4) or tuple(x.shape[-2:]) != shape:
        raise layout_error(
            f"{what} has shape {tuple(x.shape)}, expected (B', H', {shape[0]}, {shape[1]})",
            WHERE,
            "The last two sizes are ceil(q_len / block_q) and ceil(kv_len / block_k).",
        )
    return x.view((1,) * (4 - x.dim()) + tuple(x.shape))


def joint(sizes: Sequence[int], what: str) -> int:
    """The common size of broadcast dimensions (all equal or 1)."""
    wide = {n for n in sizes if n != 1}
    if len(wide) > 1:
        raise layout_error(f"{what} sizes {sorted(wide)} do not broadcast", WHERE, "Use 1 or one common size.")
    return wide.pop() if wide else 1


def classify(rule: ElementRule, b: int, p: int, block_q: int, block_k: int, q_len: int, kv_len: int) -> Tensor:
    """State of each key block against query block ``p`` under ``rule``: (Nk,) int8, 0 empty, 1 partial, 2 full."""
    device = rule.q_seg.device if rule.q_seg is not None else None
    q_pos = torch.arange(p * block_q, min(q_len, (p + 1) * block_q), device=device).view(-1, 1)
    pairs = rule.pairs(b, q_pos, torch.arange(kv_len, device=device).view(1, -1))
    return block_state(pairs, block_k)


def block_state(pairs: Tensor, block_k: int) -> Tensor:
    """Reduce an element mask (rows, kv_len) of one query block to block states (Nk,) int8."""
    tail = -pairs.shape[-1] % block_k
    some = torch.nn.functional.pad(pairs.any(0), (0, tail), value=False).view(-1, block_k).any(-1)
    every = torch.nn.functional.pad(pairs.all(0), (0, tail), value=True).view(-1, block_k).all(-1)
    return some.to(torch.int8) + (every & some).to(torch.int8)


def from_bool(
    keep: Tensor,
    block_q: int,
    block_k: int,
    q_len: int,
    kv_len: int,
    rule: ElementRule | None = None,
    kv_lens: Tensor | None = None,
) -> BlockLayout:
    """See :meth:`BlockLayout.from_bool`."""
    n_q, n_k = -(-q_len // block_q), -(-kv_len // block_k)
    if keep.dtype != torch.bool:
        raise layout_error(f"keep is {keep.dtype}", WHERE, "Pass a bool tensor, True where a block is kept.")
    keep = as_four(keep, (n_q, n_k), "keep")
    states = None
    if rule is not None:
        device = keep.device
        per_sample = [
            torch.stack([classify(rule, b, p, block_q, block_k, q_len, kv_len) for p in range(n_q)])
            for b in range(rule.batch)
        ]
        states = torch.stack(per_sample).unsqueeze(1).to(device)
    return from_states(keep, states, block_q, block_k, q_len, kv_len, rule, kv_lens).validate()


def from_states(
    keep: Tensor,
    states: Tensor | None,
    block_q: int,
    block_k: int,
    q_len: int,
    kv_len: int,
    rule: ElementRule | None,
    kv_lens: Tensor | None,
) -> BlockLayout:
    """Join kept blocks (B', H', Nq, Nk) with block states (0/1/2, same shape up to broadcasting; None: all full).

    The result is not validated yet: row bits may still be missing.
    """
    from .block_layout import BlockLayout

    valid = valid_per_sample(kv_len, block_k, kv_lens)
    batch = joint([keep.shape[0], len(valid), 1 if states is None else states.shape[0]], "batch")
    heads = joint([keep.shape[1], 1 if states is None else states.shape[1]], "head")
    full, part = [], []
    for b in range(batch):
        n = valid[b if len(valid) > 1 else 0]
        for h in range(heads):
            kept = pick(keep, b, h).clone()
            kept[:, n:] = False
            if states is None:
                full.append(row_lists(kept, n))
                continue
            state = pick(states, b, h)
            full.append(row_lists(kept & (state == 2), n))
            part.append(row_lists(kept & (state == 1), -1))
    kv_idx, kv_num = stack_lists(full, batch, heads)
    part_idx, part_num = stack_lists(part, batch, heads) if part else (None, None)
    if part_num is None or not bool(part_num.any()):
        part_idx = part_num = rule = None
    return BlockLayout(
        block_q,
        block_k,
        q_len,
        kv_len,
        kv_idx,
        kv_num,
        part_idx,
        part_num,
        causal_offset=rule.causal_offset if rule else None,
        q_seg=rule.q_seg if rule else None,
        kv_seg=rule.kv_seg if rule else None,
        kv_lens=None if kv_lens is None else kv_lens.to(torch.int32, copy=True),  # the caller may write to theirs
    )


def from_predicate(
    predicate: Callable[[Tensor, Tensor], Tensor],
    block_q: int,
    block_k: int,
    q_len: int,
    kv_len: int,
    rule: ElementRule | None,
    kv_lens: Tensor | None,
    device: torch.device | str,
) -> BlockLayout:
    """See :meth:`BlockLayout.from_predicate`."""
    n_q, n_k = -(-q_len // block_q), -(-kv_len // block_k)
    p = torch.arange(n_q, device=device).view(-1, 1)
    j = torch.arange(n_k, device=device).view(1, -1)
    state = predicate(p, j)
    state = state.broadcast_to(torch.broadcast_shapes(state.shape, (n_q, n_k)))
    if state.dtype == torch.bool:
        return from_bool(state, block_q, block_k, q_len, kv_len, rule, kv_lens)
    state = as_four(state, (n_q, n_k), "the predicate's result")
    if rule is None and bool((state == 1).any()):
        raise layout_error("the predicate returns partial blocks (1)", WHERE, "Pass rule=ElementRule(...) for them.")
    return from_states(state > 0, state, block_q, block_k, q_len, kv_len, rule, kv_lens).validate()


def from_mask_mod(
    mask_mod: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    block_q: int,
    block_k: int,
    q_len: int,
    kv_len: int,
    batch: int,
    heads: int,
    kv_lens: Tensor | None,
    device: torch.device | str,
) -> BlockLayout:
    """See :meth:`BlockLayout.from_mask_mod`. Evaluates one row of blocks at a time: O(block_q * kv_len) memory."""
    import dataclasses

    n_q = -(-q_len // block_q)
    tail = -kv_len % block_k
    states = torch.empty(batch, heads, n_q, -(-kv_len // block_k), dtype=torch.int8, device=device)
    words: dict[tuple[int, int, int], Tensor] = {}
    n = torch.arange(kv_len, device=device).view(1, -1)
    for b in range(batch):
        for h in range(heads):
            bh = (torch.tensor(b, device=device), torch.tensor(h, device=device))
            for p in range(n_q):
                i = torch.arange(p * block_q, min(q_len, (p + 1) * block_q), device=device).view(-1, 1)
                pairs = mask_mod(*bh, i, n).broadcast_to(i.shape[0], kv_len)
                states[b, h, p] = block_state(pairs, block_k)
                padded = torch.nn.functional.pad(pairs, (0, tail, 0, block_q - i.shape[0]))
                blocks = padded.unflatten(1, (-1, block_k)).transpose(0, 1)
                words[b, h, p] = pack_bits(blocks[states[b, h, p] == 1])
    layout = from_states(states > 0, states, block_q, block_k, q_len, kv_len, ElementRule(), kv_lens)
    if layout.part_idx is None:
        return layout.validate()
    bits = words[0, 0, 0].new_zeros(*layout.part_idx.shape, block_q, words[0, 0, 0].shape[-1])
    for b, h, p in [(b, h, p) for b in range(layout.batch) for h in range(layout.heads) for p in range(n_q)]:
        source = words[b if batch > 1 else 0, h if heads > 1 else 0, p]
        # kv_lens drops trailing blocks only, so the kept ones are the first.
        count = int(layout.part_num[b, h, p]) if layout.part_num is not None else 0
        bits[b, h, p, :count] = source[:count]
    layout = dataclasses.replace(layout, part_bits=bits)
    return layout.validate()
