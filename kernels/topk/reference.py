"""Row top-k as the rule reads: sort every row, keep its first k, list them ascending."""

from __future__ import annotations

import torch
from torch import Tensor

# Integers no score maps to: columns that can never be kept, and those that always are.
NEVER, ALWAYS = -(2**31), 2**31 - 1
NAN = NEVER + 1


def sort_keys(scores: Tensor) -> Tensor:
    """int32 in the order of the fp32 ``scores``: -0.0 equals 0.0, NaN comes below -inf."""
    scores = scores.to(torch.float32)
    bits = scores.masked_fill(scores == 0, 0.0).view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).masked_fill(scores.isnan(), NAN)


def row_topk_reference(
    scores: Tensor, k: Tensor, valid: Tensor | None = None, forced: Tensor | None = None, first: int = 0
) -> tuple[list[list[list[list[int]]]], Tensor]:
    """Lists and their lengths; see :func:`patchkit.kernels.topk.row_topk`.

    Args:
        scores: (B, H, R, N).
        k: (B, H) entries to keep in each row.
        valid: (B,) columns that may be kept.
        forced: bool (B, H, R, N), always kept and not counted in ``k``.
        first: number of the first column.
    """
    B, H, R, N = scores.shape
    lists = []
    for b in range(B):
        n = N if valid is None else int(valid[b])
        lists.append(
            [
                [_row(scores[b, h, r, :n], int(k[b, h]), _at(forced, b, h, r, n), first) for r in range(R)]
                for h in range(H)
            ]
        )
    num = torch.tensor([[[len(row) for row in head] for head in sample] for sample in lists], dtype=torch.int32)
    return lists, num.view(B, H, R)


def _at(forced: Tensor | None, b: int, h: int, r: int, n: int) -> list[bool]:
    return [False] * n if forced is None else forced[b, h, r, :n].tolist()


def _row(scores: Tensor, k: int, forced: list[bool], first: int) -> list[int]:
    value = [float("nan") if s != s else float(s) for s in scores.float().tolist()]
    free = [j for j in range(len(value)) if not forced[j]]
    # NaN after all numbers, larger ones first, equal ones by index.
    free.sort(key=lambda j: (value[j] != value[j], -value[j] if value[j] == value[j] else 0.0, j))
    kept = free[: max(0, k)] + [j for j in range(len(value)) if forced[j]]
    return [first + j for j in sorted(kept)]
