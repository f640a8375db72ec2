"""Reordering of the visual tokens of each head: the public operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import gpu
from ..errors import refuse_gradient, value_error
from .blocked import reorder_blocked
from .orders import NAMES, ORDERS, WHERE, address_table, check_codes, distinct_orders, rows_of_order

__all__ = ["NAMES", "ORDERS", "address_table", "distinct_orders", "reorder_heads", "rows_of_order"]


@torch.library.custom_op("patchkit::reorder_heads", mutates_args=())
def _reorder(
    xs: Sequence[Tensor], codes: Sequence[int], grid: Sequence[int], start: int, inverse: bool
) -> list[Tensor]:
    shape = (int(grid[0]), int(grid[1]), int(grid[2]))
    if gpu.obstacle(xs[0].device) is None:
        from .triton import MOST, TYPES, reorder_triton

        alike = all(x.shape[2:] == xs[0].shape[2:] and x.dtype == xs[0].dtype for x in xs)
        if alike and len(xs) <= MOST and xs[0].dtype in TYPES and xs[0].stride(-1) == 1:
            return reorder_triton(xs, codes, shape, start, inverse)
    return [reorder_blocked(x, codes, shape, start, inverse) for x in xs]


@_reorder.register_fake
def _(xs: Sequence[Tensor], codes: Sequence[int], grid: Sequence[int], start: int, inverse: bool) -> list[Tensor]:
    return [x.new_empty(x.shape[0], len(codes), *x.shape[2:]) for x in xs]


def reorder_heads(
    *tensors: Tensor, codes: Sequence[int], grid: Sequence[int], start: int = 0, inverse: bool = False
) -> list[Tensor]:
    """Put the visual tokens of each head into an order of its own (PAROAttention, arXiv 2506.16054).

    Args:
        tensors: (B, Hkv, N, D) each; the tokens ``start`` to ``start + F*H*W`` are a grid, W fastest.
        codes: the order of each of the H query heads, 0 to 5 (see ``NAMES``); head h reads head h // (H / Hkv).
        grid: (F, H, W).
        start: where the grid begins in the sequence; other tokens (text) stay where they are.
        inverse: put tokens back instead. Orders 2 and 5 undo each other, the others undo themselves.

    Returns:
        New contiguous tensors (B, H, N, D); no input is changed.

    Raises:
        KernelValueError: unknown codes, or a grid that does not fit into the sequence.
        GradientError: when a gradient would be recorded.
    """
    check_codes(codes, grid)
    tokens = grid[0] * grid[1] * grid[2]
    for x in tensors:
        if x.dim() != 4 or start < 0 or start + tokens > x.shape[2]:
            raise value_error(
                f"a tensor {tuple(x.shape)} has no tokens {start} to {start + tokens}", WHERE, "Expected (B, H, N, D)."
            )
        if len(codes) % x.shape[1]:
            raise value_error(f"{len(codes)} codes for {x.shape[1]} heads", WHERE, "Give one for each query head.")
    refuse_gradient(WHERE, **{f"tensor {i}": x for i, x in enumerate(tensors)})
    return list(_reorder(tensors, list(codes), list(grid), start, inverse))
