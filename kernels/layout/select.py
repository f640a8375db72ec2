"""Row-wise top-k selection of key blocks (AdaSpa, arXiv 2502.21079, section 4: row-wise uniform selection)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import layout_error
from ..topk import row_topk
from .build import as_four, joint, valid_per_sample

if TYPE_CHECKING:
    from .block_layout import BlockLayout


def from_topk(
    W: Tensor,
    k_per_head: int | Tensor,
    forced: Tensor | None,
    block_q: int,
    block_k: int,
    q_len: int,
    kv_len: int,
    kv_lens: Tensor | None,
    k_max: int | None = None,
) -> BlockLayout:
    """See :meth:`BlockLayout.from_topk`."""
    from .block_layout import BlockLayout

    shape = (-(-q_len // block_q), -(-kv_len // block_k))
    W = as_four(W.detach() if W.is_floating_point() else W.float(), shape, "W")
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
        forced = as_four(forced.to(W.device).broadcast_to((*forced.shape[:-2], *shape)), shape, "forced")
    on_cpu = W.device.type == "cpu"
    valid = _valid_blocks(kv_len, block_k, kv_lens, W.device)
    extra = (1, 1) if forced is None else tuple(forced.shape[:2])
    batch = joint([W.shape[0], k_table.shape[0], valid.shape[0], extra[0]], "batch")
    heads = joint([W.shape[1], k_table.shape[1], extra[1]], "head")
    if k_max is None:
        k_max = k_per_head if isinstance(k_per_head, int) else int(k_table.max())
    scores, valid = W.expand(batch, heads, *shape), valid.expand(batch)
    k = k_per_head if isinstance(k_per_head, int) else k_table.broadcast_to(batch, heads)
    if forced is None and not on_cpu:
        # A row of n_k blocks is complete and takes no room, so the longest list can be told without reading anything.
        width = min(k_max, shape[1] - 1) if k_table.numel() > 1 or k_max < shape[1] else 1
    else:
        width = _longest(k_table.clamp(max=k_max).to(W.device), valid, forced)
    kv_idx, kv_num = row_topk(scores, k, k_max, valid=valid, forced=forced, width=max(1, width))
    # Lists of complete rows are not read; zeros instead make equal layouts equal tensors.
    kv_idx.masked_fill_((kv_num == valid.view(-1, 1, 1)).unsqueeze(-1), 0)
    lens = None if kv_lens is None else kv_lens.to(W.device, torch.int32, copy=True)
    return BlockLayout(block_q, block_k, q_len, kv_len, kv_idx, kv_num, kv_lens=lens).assured()


def _valid_blocks(kv_len: int, block_k: int, kv_lens: Tensor | None, device: torch.device) -> Tensor:
    """(1 or B,) int32 key blocks of each sample. Only a CPU looks at the lengths: an accelerator would have to wait."""
    if kv_lens is None or kv_lens.device.type == "cpu":
        return torch.tensor(valid_per_sample(kv_len, block_k, kv_lens), dtype=torch.int32, device=device)
    return ((kv_lens.clamp(0, kv_len) + block_k - 1) // block_k).to(device, torch.int32)


def _longest(k: Tensor, valid: Tensor, forced: Tensor | None) -> int:
    """The most blocks that a row lists, complete rows left out; on an accelerator this waits for it."""
    valid = valid.view(-1, 1, 1)
    k = k.clamp(min=0).unsqueeze(-1)
    if forced is None:
        count = torch.minimum(k, valid)
    else:
        inside = torch.arange(forced.shape[-1], device=valid.device) < valid.unsqueeze(-1)
        must = (forced & inside).sum(-1)
        count = torch.minimum(k, valid - must) + must
    return int(count.masked_fill(count == valid, 0).amax())
