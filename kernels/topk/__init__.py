"""Row top-k: the best entries of every row as ascending index lists, ready for a block layout."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import gpu
from ..errors import refuse_gradient, type_error, value_error
from .blocked import row_topk_blocked

__all__ = ["row_topk"]

WHERE = "row_topk"


@torch.library.custom_op("patchkit::row_topk", mutates_args=())
def _row_topk(
    scores: Tensor, k: Tensor | None, k_max: int, valid: Tensor | None, forced: Tensor | None, first: int, width: int
) -> tuple[Tensor, Tensor]:
    dtype = index_dtype(first + scores.shape[-1])
    if gpu.obstacle(scores.device) is None:
        from .triton import row_topk_triton, unsupported

        if unsupported(scores) is None:
            return row_topk_triton(scores, k, k_max, valid, forced, first, width, dtype)
    return row_topk_blocked(scores, k, k_max, valid, forced, first, width, dtype)


@_row_topk.register_fake
def _(
    scores: Tensor, k: Tensor | None, k_max: int, valid: Tensor | None, forced: Tensor | None, first: int, width: int
) -> tuple[Tensor, Tensor]:
    dtype = index_dtype(first + scores.shape[-1])
    lists = scores.new_empty((*scores.shape[:3], width), dtype=dtype)
    return lists, scores.new_empty(scores.shape[:3], dtype=torch.int32)


def index_dtype(columns: int) -> torch.dtype:
    """Smallest index dtype for ``columns`` columns. torch's uint16 has no gather or sort, so int16 takes its place."""
    return torch.int16 if columns <= torch.iinfo(torch.int16).max else torch.int32


def row_topk(
    scores: Tensor,
    k: int | Tensor,
    k_max: int | None = None,
    *,
    valid: Tensor | None = None,
    forced: Tensor | None = None,
    first: int = 0,
    width: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row, listed by ascending column. For AdaSpa's row-wise choice (arXiv 2502.21079).

    Ties go to the lower column. All numbers come before NaN, -inf as the smallest of them: a row keeps -inf only when
    nothing larger is left, and NaN only when no number is left. -0.0 equals 0.0. Scores are compared in fp32.

    Nothing here waits for an accelerator, except that ``k`` as a tensor without ``k_max`` is read once.

    Args:
        scores: (B, H, R, N), (H, R, N) or (R, N) floating; any strides.
        k: entries to keep, an int or an integer tensor that broadcasts to (B, H).
        k_max: bound of ``k`` known to the host; a larger ``k`` counts as this. Default: the largest ``k``.
        valid: (B,) integers, columns of each sample that may be kept: the first ones. Default: all.
        forced: bool, broadcastable to ``scores``: kept in any case, not ranked, and not counted in ``k``.
        first: number of the first column; the lists begin counting there.
        width: length of the lists. Default: min(k_max, N), with ``forced`` N; at least 1.

    Returns:
        idx (B, H, R, width) int16, or int32 where column numbers need it: ascending, and 0 past the end of a list. A
        row that keeps more than ``width`` lists its first ones. num (B, H, R) int32: how many each row keeps,
        min(k, free columns) and the forced ones. Leading dimensions are those of ``scores``.

    Raises:
        KernelValueError: shapes, devices or numbers that do not fit.
        KernelTypeError: scores that are not floating, k or valid that are not integers, forced that is not bool.
        GradientError: when a gradient would be recorded.
    """
    if scores.dim() not in (2, 3, 4):
        raise value_error(f"scores {tuple(scores.shape)}", WHERE, "Expected (B, H, R, N), (H, R, N) or (R, N).")
    if not scores.is_floating_point():
        raise type_error(f"scores are {scores.dtype}", WHERE, "Pass a floating tensor.")
    refuse_gradient(WHERE, scores=scores)
    lead = scores.shape[:-2]
    wide = scores.view((1,) * (4 - scores.dim()) + tuple(scores.shape))
    table, k_max = _budget(k, k_max, wide)
    valid = _valid(valid, wide)
    must = _forced(forced, wide)
    if width is None:
        width = wide.shape[-1] if must is not None else min(k_max, wide.shape[-1])
    elif width < 1:
        raise value_error(f"width is {width}", WHERE, "Use 1 or more.")
    idx, num = _row_topk(wide, table, k_max, valid, must, first, max(1, width))
    return idx.view(*lead, *idx.shape[2:]), num.view(*lead, num.shape[2])


def _budget(k: int | Tensor, k_max: int | None, scores: Tensor) -> tuple[Tensor | None, int]:
    """``k`` as a table (B, H) on the device of the scores, or None where it is ``k_max`` throughout; and ``k_max``."""
    if k_max is not None and k_max < 0:
        raise value_error(f"k_max is {k_max}", WHERE, "Use 0 or more.")
    n = scores.shape[-1]
    if isinstance(k, int):
        return None, min(max(0, k), n if k_max is None else k_max, n)
    if k.is_floating_point() or k.dtype == torch.bool:
        raise type_error(f"k is {k.dtype}", WHERE, "Pass an int or an integer tensor.")
    if k_max is None:
        k_max = max(0, int(k.max())) if k.numel() else 0
    try:
        table = k.to(scores.device, torch.int32).broadcast_to(scores.shape[:2])
    except RuntimeError as error:
        raise value_error(f"k {tuple(k.shape)}", WHERE, f"It must broadcast to {tuple(scores.shape[:2])}.") from error
    return table, min(k_max, n)


def _valid(valid: Tensor | None, scores: Tensor) -> Tensor | None:
    if valid is None:
        return None
    if valid.is_floating_point() or valid.dtype == torch.bool:
        raise type_error(f"valid is {valid.dtype}", WHERE, "Pass integers.")
    if tuple(valid.shape) != (scores.shape[0],):
        raise value_error(f"valid {tuple(valid.shape)}", WHERE, f"Give one number per sample, {scores.shape[0]}.")
    return valid.to(scores.device, torch.int32)


def _forced(forced: Tensor | None, scores: Tensor) -> Tensor | None:
    if forced is None:
        return None
    if forced.dtype != torch.bool:
        raise type_error(f"forced is {forced.dtype}", WHERE, "Pass a bool tensor.")
    try:
        return forced.to(scores.device).broadcast_to(scores.shape)
    except RuntimeError as error:
        raise value_error(f"forced {tuple(forced.shape)}", WHERE, f"It must fit {tuple(scores.shape)}.") from error
