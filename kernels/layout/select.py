"""Row-wise top-k selection of key blocks (AdaSpa, arXiv 2502.21079, section 4: row-wise uniform selection)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import layout_error
from .build import as_four, joint, pick, row_lists, stack_lists, valid_per_sample

if TYPE_CHECKING:
    from .block_layout import BlockLayout


def topk_mask(score: Tensor, k: int) -> Tensor:
    """Bool mask of the ``k`` largest entries of each row of ``score`` (R, N); ties go to the lower index.

    ``topk`` alone breaks ties arbitrarily, and a stable sort costs about five times as much, so: find the k-th value,
    take everything above it, then fill up with the first entries equal to it.
    """
    n = score.shape[-1]
    if k <= 0:
        return torch.zeros_like(score, dtype=torch.bool)
    if k >= n:
        return torch.ones_like(score, dtype=torch.bool)
    threshold = score.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above = score > threshold
    equal = score == threshold
    missing = k - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= missing))


def from_topk(
    W: Tensor,
    k_per_head: int | Tensor,
    forced: Tensor | None,
    block_q: int,
    block_k: int,
    q_len: int,
    kv_len: int,
    kv_lens: Tensor | None,
) -> BlockLayout:
    """See :meth:`BlockLayout.from_topk`."""
    from .block_layout import BlockLayout

    shape = (-(-q_len // block_q), -(-kv_len // block_k))
    W = as_four(W, shape, "W")
    k_table = torch.as_tensor(k_per_head)
    if k_table.is_floating_point() or k_table.dtype == torch.bool or k_table.dim() > 2:
        raise layout_error(
            f"k_per_head is {k_table.dtype} of shape {tuple(k_table.shape)}",
            "BlockLayout.from_topk",
            "Pass an int or an integer tensor that broadcasts to (B', H').",
        )
    k_table = k_table.view((1,) * (2 - k_table.dim()) + tuple(k_table.shape))
    if forced is not None:
        if forced.dtype != torch.bool:
            raise layout_error(f"forced is {forced.dtype}", "BlockLayout.from_topk", "Pass a bool tensor.")
        forced = as_four(forced.broadcast_to((*forced.shape[:-2], *shape)), shape, "forced")
    valid = valid_per_sample(kv_len, block_k, kv_lens)
    extra = (1, 1) if forced is None else tuple(forced.shape[:2])
    batch = joint([W.shape[0], k_table.shape[0], len(valid), extra[0]], "batch")
    heads = joint([W.shape[1], k_table.shape[1], extra[1]], "head")
    ks = k_table.broadcast_to(batch, heads).tolist()
    lists = []
    for b in range(batch):
        n = valid[b if len(valid) > 1 else 0]
        for h in range(heads):
            # Ineligible blocks (past the end, forced, NaN) rank last and are removed or added afterwards.
            score = pick(W, b, h)[:, :n].to(torch.float32).nan_to_num(nan=float("-inf"))
            must = None if forced is None else pick(forced, b, h)[:, :n].to(score.device)
            if must is not None:
                score = score.masked_fill(must, float("-inf"))
            keep = topk_mask(score, int(ks[b][h]))
            if must is not None:
                keep |= must
            lists.append(row_lists(torch.nn.functional.pad(keep, (0, shape[1] - n)), n))
    kv_idx, kv_num = stack_lists(lists, batch, heads)
    lens = None if kv_lens is None else kv_lens.to(torch.int32)
    return BlockLayout(block_q, block_k, q_len, kv_len, kv_idx, kv_num, kv_lens=lens).validate()
