"""Validation of a layout against itself, and of the tensors it is used with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import layout_error

if TYPE_CHECKING:
    from .block_layout import BlockLayout

WHERE = "BlockLayout"
REBUILD = "Build the layout with one of its from_* constructors."


def check_layout(layout: BlockLayout) -> None:
    """Raise :class:`LayoutError` unless the layout is sound. Reads the index tensors once."""
    for name in ("block_q", "block_k", "q_len", "kv_len"):
        value = getattr(layout, name)
        if not isinstance(value, int) or value < 1:
            raise layout_error(f"{name} is {value!r}, not a positive int", WHERE, REBUILD)
    for name, x in layout._tensors().items():
        if x.device != layout.device:
            raise layout_error(f"{name} is on {x.device}, kv_num on {layout.device}", WHERE, "Use layout.to(device).")
    _check_lengths(layout)
    complete = layout.valid_blocks
    _check_lists("kv", layout.kv_idx, layout.kv_num, layout, complete)
    if (layout.part_idx is None) != (layout.part_num is None):
        raise layout_error("part_idx and part_num come together", WHERE, REBUILD)
    if layout.part_idx is None or layout.part_num is None:
        if layout.part_mask != "none":
            raise layout_error(f"rule {layout.part_mask!r} without partial blocks", WHERE, REBUILD)
        return
    _check_lists("part", layout.part_idx, layout.part_num, layout, torch.full_like(complete, -1))
    _check_rule(layout)
    _check_disjoint(layout)


def _check_lengths(layout: BlockLayout) -> None:
    lens = layout.kv_lens
    if lens is None:
        return
    if lens.dim() != 1 or lens.is_floating_point():
        raise layout_error(f"kv_lens is {lens.dtype} {tuple(lens.shape)}", WHERE, "Pass integers of shape (B,).")
    if int(lens.min()) < 0 or int(lens.max()) > layout.kv_len:
        raise layout_error(f"kv_lens outside 0..{layout.kv_len}", WHERE, "Give the valid keys per sample.")
    if layout.batch not in (1, lens.numel()):
        raise layout_error(f"{lens.numel()} kv_lens for B' = {layout.batch}", WHERE, REBUILD)
    blocks = (lens + layout.block_k - 1) // layout.block_k
    if layout.batch == 1 and int(blocks.min()) != int(blocks.max()):
        raise layout_error("kv_lens end in different blocks but B' is 1", WHERE, "Lists must be per sample then.")


def _check_lists(name: str, idx: Tensor, num: Tensor, layout: BlockLayout, complete: Tensor) -> None:
    """Shapes, dtypes, range and order of one pair of list tensors; ``complete`` marks implicit rows."""
    if num.dtype != torch.int32 or idx.dtype not in (torch.int16, torch.int32):
        raise layout_error(f"{name}_num is {num.dtype}, {name}_idx {idx.dtype}", WHERE, "Use int32 and int16/int32.")
    expected = (layout.batch, layout.heads, layout.n_q)
    if tuple(num.shape) != expected or tuple(idx.shape[:-1]) != expected:
        raise layout_error(
            f"{name}_num {tuple(num.shape)}, {name}_idx {tuple(idx.shape)}, expected (B', H', Nq) = {expected}",
            WHERE,
            "Nq is ceil(q_len / block_q).",
        )
    implicit = num == complete
    width = idx.shape[-1]
    if bool(((num < 0) | (~implicit & (num > width))).any()):
        raise layout_error(f"{name}_num outside 0..{width}", WHERE, REBUILD)
    limit = layout.valid_blocks.unsqueeze(-1)
    used = torch.arange(width, device=idx.device) < num.masked_fill(implicit, 0).unsqueeze(-1)
    if bool((used & ((idx < 0) | (idx >= limit))).any()):
        raise layout_error(f"{name}_idx lists a block past the last valid key block", WHERE, REBUILD)
    if width > 1 and bool((used[..., 1:] & (idx[..., 1:] <= idx[..., :-1])).any()):
        raise layout_error(f"{name}_idx is not ascending and unique", WHERE, REBUILD)


def _check_rule(layout: BlockLayout) -> None:
    assert layout.part_idx is not None
    if layout.part_mask == "none":
        raise layout_error("partial blocks without an element rule", WHERE, "List them as full, or give a rule.")
    if (layout.q_seg is None) != (layout.kv_seg is None):
        raise layout_error("q_seg and kv_seg come together", WHERE, "Pass both.")
    for name, seg, length in (("q_seg", layout.q_seg, layout.q_len), ("kv_seg", layout.kv_seg, layout.kv_len)):
        if seg is not None and (seg.dim() not in (1, 2) or seg.shape[-1] != length):
            raise layout_error(f"{name} is {tuple(seg.shape)}, not (..., {length})", WHERE, "One id per token.")
        if seg is not None and (seg.is_floating_point() or seg.dtype == torch.bool):
            raise layout_error(f"{name} is {seg.dtype}", WHERE, "Segment ids are integers.")
    words = -(-layout.block_k // 64)
    expected = (*layout.part_idx.shape, layout.block_q, words)
    if layout.part_bits is not None and (
        tuple(layout.part_bits.shape) != expected or layout.part_bits.dtype != torch.int64
    ):
        raise layout_error(
            f"part_bits is {layout.part_bits.dtype} {tuple(layout.part_bits.shape)}, expected int64 {expected}",
            WHERE,
            REBUILD,
        )


def _check_disjoint(layout: BlockLayout) -> None:
    from .convert import full_mask, scatter_lists

    assert layout.part_idx is not None
    assert layout.part_num is not None
    for b in range(layout.batch):
        for h in range(layout.heads):
            part = scatter_lists(layout.part_idx[b, h], layout.part_num[b, h], layout.n_k)
            if bool((full_mask(layout, b, h) & part).any()):
                raise layout_error("a block is listed both full and partial", WHERE, REBUILD)
