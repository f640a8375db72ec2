"""The six orders in which the tokens of a latent grid can stand, and where each of them finds a token.

A grid (F, H, W) is stored with W fastest. PAROAttention (arXiv 2506.16054) gives every head the order of axes in which
its attention is local. The codes are those of the authors' plan files.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import value_error

# code -> axes of the grid from slow to fast, as the argument of ``x.view(F, H, W).permute(...)``
ORDERS = ((0, 1, 2), (0, 2, 1), (1, 2, 0), (1, 0, 2), (2, 1, 0), (2, 0, 1))
NAMES = tuple("".join("FHW"[axis] for axis in axes) for axes in ORDERS)

WHERE = "reorder_heads"
Grid = tuple[int, int, int]


def check_codes(codes: Sequence[int], grid: Sequence[int]) -> None:
    """Raise KernelValueError for codes or a grid that do not exist."""
    if len(grid) != 3 or min(grid) < 1:
        raise value_error(f"the grid is {tuple(grid)}", WHERE, "Give (frames, rows, columns), each 1 or more.")
    wrong = sorted({int(c) for c in codes if not 0 <= c < len(ORDERS)})
    if wrong:
        raise value_error(f"there is no order {wrong}", WHERE, f"Codes are 0 to 5: {', '.join(NAMES)}.")


@functools.lru_cache(maxsize=64)
def rows_of_order(code: int, grid: Grid) -> Tensor:
    """r (F*H*W,) int64 on the CPU: token n of the reordered sequence stands at r[n] in the original one."""
    f, h, w = grid
    return torch.arange(f * h * w, device="cpu").view(f, h, w).permute(ORDERS[code]).reshape(-1)


@functools.lru_cache(maxsize=256)
def rows_on(code: int, grid: Grid, device: torch.device) -> Tensor:
    """:func:`rows_of_order` on ``device``, kept there."""
    return rows_of_order(code, grid).to(device)


def strides_of_order(code: int, grid: Grid) -> tuple[int, int, int, int, int]:
    """(n1, n2, s0, s1, s2): r(n) = (n // (n1 n2)) s0 + (n // n2 mod n1) s1 + (n mod n2) s2."""
    strides = (grid[1] * grid[2], grid[2], 1)
    first, second, third = ORDERS[code]
    return grid[second], grid[third], strides[first], strides[second], strides[third]


@functools.lru_cache(maxsize=256)
def address_table(codes: tuple[int, ...], grid: Grid, device: torch.device) -> Tensor:
    """(heads, 5) int32 on ``device``: :func:`strides_of_order` of every head, as the Triton kernels read it."""
    return torch.tensor([strides_of_order(c, grid) for c in codes], dtype=torch.int32, device=device)


def distinct_orders(grid: Grid) -> tuple[int, ...]:
    """The codes that differ on this grid, each with the lowest number: an image (F = 1) has two, 0 and 1."""
    found: dict[tuple[int, ...], int] = {}
    for code, axes in enumerate(ORDERS):
        found.setdefault(tuple(a for a in axes if grid[a] > 1), code)
    return tuple(sorted(found.values()))
