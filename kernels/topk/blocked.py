"""Row top-k in plain torch, some rows at a time: no sort, and no int64 tensor of the size of the scores."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..threads import for_each
from .reference import ALWAYS, NEVER, sort_keys

# Scores worked on together, by device: within a core's cache, or a launch large enough for an accelerator.
CHUNK, DEVICE_CHUNK = 1 << 18, 1 << 22
INFINITY = 0x7F800000  # as the bits of an fp32


def row_topk_blocked(
    scores: Tensor,
    k: Tensor | None,
    k_max: int,
    valid: Tensor | None,
    forced: Tensor | None,
    first: int,
    width: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """See :func:`patchkit.kernels.topk.row_topk`; ``k`` (B, H), ``valid`` (B,) and ``forced`` (B, H, R, N) expanded."""
    B, H, R, N = scores.shape
    idx = torch.zeros(B, H, R, width, dtype=dtype, device=scores.device)
    num = torch.empty(B, H, R, dtype=torch.int32, device=scores.device)
    on_cpu = scores.device.type == "cpu"
    step = max(1, (CHUNK if on_cpu else DEVICE_CHUNK) // max(1, N))
    pieces = [(b, h, start) for b in range(B) for h in range(H) for start in range(0, R, step)]

    def make_worker() -> Callable[[tuple[int, int, int]], None]:
        def work(at: tuple[int, int, int]) -> None:
            b, h, start = at
            rows = slice(start, start + step)
            part, out, count = scores[b, h, rows], idx[b, h, rows], num[b, h, rows]
            budget = k_max if k is None else k[b, h].clamp(0, k_max)
            if on_cpu and forced is None:
                columns = N if valid is None else min(N, max(0, int(valid[b])))
                _even(part[:, :columns], max(0, min(int(budget), columns)), first, out, count)
            else:
                must = None if forced is None else forced[b, h, rows]
                _uneven(part, budget, k_max, None if valid is None else valid[b], must, first, out, count)

        return work

    for_each(pieces, make_worker, scores.device)
    return idx, num


def _even(scores: Tensor, k: int, first: int, out: Tensor, num: Tensor) -> None:
    """All rows of ``scores`` (r, n) keep ``k``, which the host knows."""
    num.fill_(k)
    r, n = scores.shape
    stored = min(k, out.shape[-1])
    if stored == 0:
        return
    if k == n:
        out[:, :stored] = torch.arange(first, first + stored, dtype=out.dtype)
        return
    key = _keys(scores)
    threshold = key.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    keep = key >= threshold
    if int(keep.sum()) != r * k:  # more entries equal the k-th than there is room for
        keep = _first_of_equals(key, threshold, k)
    places = keep.flatten().nonzero().view(r, k)[:, :stored]  # of all (r, n), row by row and ascending
    out[:, :stored] = places - torch.arange(0, r * n, n).unsqueeze(-1) + first


def _uneven(
    scores: Tensor,
    budget: int | Tensor,
    k_max: int,
    valid: Tensor | None,
    forced: Tensor | None,
    first: int,
    out: Tensor,
    num: Tensor,
) -> None:
    """Rows that keep different numbers, or numbers that only the device knows; nothing here waits for it."""
    r, n = scores.shape
    column = torch.arange(n, device=scores.device)
    limit = torch.full((), n, device=scores.device) if valid is None else valid.clamp(0, n)
    past = (column >= limit).expand(r, n)
    key = sort_keys(scores)
    extra = torch.zeros((), dtype=torch.int64, device=scores.device)
    most = min(n, k_max)
    if forced is not None:
        key = key.masked_fill(forced, ALWAYS)
        extra, most = (forced & ~past).sum(-1, keepdim=True), n
    key = key.masked_fill(past, NEVER)
    if isinstance(budget, int):
        budget = torch.full((), budget, device=scores.device)
    k = (torch.minimum(limit - extra, budget) + extra).expand(r, 1)
    num.copy_(k.squeeze(-1))
    if most == 0:
        return
    values = key.topk(most, dim=-1, sorted=True).values
    threshold = values.gather(-1, (k - 1).clamp(min=0))
    keep = _first_of_equals(key, threshold, k) & (k > 0)
    # One spare slot takes what is not kept or has no room.
    room = out.shape[-1]
    slot = (keep.cumsum(-1) - 1).masked_fill_(~keep, room).clamp_(max=room)
    wide = torch.zeros(r, room + 1, dtype=out.dtype, device=scores.device)
    out.copy_(wide.scatter_(1, slot, (column + first).to(out.dtype).expand(r, n))[:, :room])


def _keys(scores: Tensor) -> Tensor:
    """:func:`sort_keys`; what is neither negative nor NaN, as masses are, is in the order of its bits already."""
    if scores.dtype == torch.float32:
        bits = scores.view(torch.int32)
        low, high = (int(x) for x in bits.aminmax())
        if low >= 0 and high <= INFINITY:
            return bits
    return sort_keys(scores)


def _first_of_equals(key: Tensor, threshold: Tensor, k: int | Tensor) -> Tensor:
    """The k of each row that are the largest: all above the threshold, and the first of those equal to it."""
    above, level = key > threshold, key == threshold
    missing = k - above.sum(-1, keepdim=True)
    return above | (level & (level.cumsum(-1, dtype=torch.int32) <= missing))
