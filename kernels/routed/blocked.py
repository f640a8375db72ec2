"""Attention of routed heads in plain torch: the active rows of each KV head gathered, in pieces by what they see.

Rows of a piece that all see the same keys are one call of torch's own kernel. Under causality a piece is two products
with a power of two between them, over the keys up to its last row; only the part behind its first row is masked. No
maximum is subtracted there: fp32 holds exp(x) for any x that attention meets in practice, so the sum of a row says
afterwards whether it did, and a piece where it did not is computed again by torch's kernel, in two parts that are
joined by their log-sum-exps. Low precision is widened first, unless the CPU multiplies it in hardware.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..dense.library import dense_with_lse
from ..merge import merge_states
from ..sparse.blocked.tile import native_low_precision
from ..threads import for_each
from .decode import routed_decode
from .dense import dense_heads, joins
from .reference import everywhere
from .rows import Piece, Rows, gather, rows_of
from .sight import Sight, sights_of

# Rows that are multiplied at a time with the keys that all of them see, and of these rows those that go on from there
# together: behind its diagonal a row is multiplied for nothing. Where all rows see the same keys there is no diagonal.
PIECE, LEAF, PIECE_LEVEL = 256, 128, 1024
# Keys of one step: its logits stay near the core.
STEP = 1024
# Bytes of widened keys and values at a time; at least one KV head's.
SPAN_BYTES = 32 * 2**20
# Sums of powers of two within these limits lost nothing to overflow or underflow that fp32 would have kept.
LEAST, MOST = 2.0**-64, 2.0**100
LOG2E = math.log2(math.e)


def routed_blocked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    active: Tensor,
    shared: int,
    gates: Tensor | None,
    scale: float,
    causal: bool,
    mask: Tensor | None,
) -> Tensor:
    """See :func:`patchkit.kernels.routed_attention`; contiguous, zero where not active."""
    H, G = q.shape[1], k.shape[1]
    if q.shape[2] == 1 and q.device.type == "cpu":
        return routed_decode(q, k, v, everywhere(active, shared), gates, scale, mask)
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    sights = sights_of(q.shape[0], q.shape[2], k.shape[2], causal, mask, q.device)
    whole = shared if all(joins(sight) for sight in set_of(sights)) else 0
    for heads, kv in dense_parts(whole, H // G):
        # Written part by part: a KV head's group may be shared in part.
        out[:, heads] = dense_heads(q[:, heads], k[:, kv], v[:, kv], scale, causal, mask, sights)
    if whole and gates is not None:
        out[:, :whole] *= gates[:, :whole].unsqueeze(-1)
    active = everywhere(active, shared).clone()
    active[:, :whole] = False
    for b, sight in enumerate(sights):
        routed_sample(q[b], k[b], v[b], active[b], None if gates is None else gates[b], scale, sight, out[b])
    return out


def set_of(sights: list[Sight]) -> list[Sight]:
    """Each of them once."""
    return list({id(sight): sight for sight in sights}.values())


def dense_parts(shared: int, group: int) -> list[tuple[slice, slice]]:
    """Query heads 0..shared with their KV heads: whole groups, and then the begin of one."""
    whole = shared // group
    parts = [(slice(0, whole * group), slice(0, whole))] if whole else []
    if shared % group:
        parts.append((slice(whole * group, shared), slice(whole, whole + 1)))
    return parts


def routed_sample(
    q: Tensor, k: Tensor, v: Tensor, active: Tensor, gates: Tensor | None, scale: float, sight: Sight, out: Tensor
) -> None:
    """Write the active rows of one sample into ``out`` (H, N, D)."""
    span: list[Work] = []
    size = 0
    for rows in rows_of(active, k.shape[0], sight):
        span.append(Work(rows, q, k[rows.kv_head], v[rows.kv_head], scale, sight))
        size += span[-1].copied
        if size > SPAN_BYTES:
            _span(span, gates, out)
            span, size = [], 0
    _span(span, gates, out)


def _span(span: list[Work], gates: Tensor | None, out: Tensor) -> None:
    """Compute the rows of some KV heads, all threads at once; the pieces with the most keys first."""
    pieces = [(work, part) for work in span for part in work.parts()]
    pieces.sort(key=lambda piece: -piece[1][-1].last)
    for_each(pieces, Piecework, out.device)

    def finish(work: Work) -> None:
        at, found = (work.rows.heads, work.rows.tokens), work.finished()
        if gates is not None:
            found = found * gather(gates, *at).unsqueeze(-1)
        out.view(-1, out.shape[-1]).index_copy_(0, at[0] * out.shape[1] + at[1], found.to(out.dtype))

    for_each(span, lambda: finish, out.device)


class Work:
    """The rows of one KV head.

    Attributes:
        rows: R of them.
        q: (R, D), times ``scale`` log2(e) where powers of two are summed.
        k: (count, D), the keys that any row sees.
        v: as ``k``.
        ends: (R, 1), how many each row sees, in the dtype of q.
        out: (R, D), to be divided by ``total`` (R,) where powers of two are summed.
        copied: bytes of what was not there before.
    """

    def __init__(self, rows: Rows, q: Tensor, k: Tensor, v: Tensor, scale: float, sight: Sight) -> None:
        low, on_cpu = q.dtype in (torch.bfloat16, torch.float16), q.device.type == "cpu"
        dtype = torch.float32 if low and on_cpu and not native_low_precision() else q.dtype
        self.rows, self.scale, self.sight = rows, scale, sight
        self.level = sight.pairs is None and bool(rows.ends[0] == rows.ends[-1])
        # Products in low precision need the maximum subtracted, and an accelerator would have to be waited for.
        self.powers = on_cpu and dtype in (torch.float32, torch.float64) and not self.level and sight.pairs is None
        self.q = gather(q, rows.heads, rows.tokens).to(dtype)
        self.k, self.v = (sight.of(x).to(dtype) for x in (k, v))
        self.copied = self.q.nbytes * 2 + (self.k.nbytes * 2 if dtype != q.dtype else 0)
        self.out = torch.empty_like(self.q)
        if self.powers:
            self.q *= scale * LOG2E
            self.ends, self.total = rows.ends.to(dtype).unsqueeze(-1), self.q.new_empty(len(self.q))
            self.place = torch.arange(len(self.k), dtype=dtype)

    def parts(self) -> list[list[Piece]]:
        """Pieces to compute one at a time, each in its leaves."""
        leaves = self.rows.pieces(LEAF if self.powers else PIECE_LEVEL if self.level else PIECE)
        each = PIECE // LEAF if self.powers else 1
        return [leaves[i : i + each] for i in range(0, len(leaves), each)]

    def finished(self) -> Tensor:
        """The output of the rows."""
        if not self.powers:
            return self.out
        least, most = torch.aminmax(self.total)
        # NaN compares false. A sum over the output finds an overflow of the weighted values.
        if float(least) >= LEAST and float(most) <= MOST and math.isfinite(float(self.out.sum())):
            return self.out.div_(self.total.unsqueeze(-1))
        good = (self.total >= LEAST) & (self.total <= MOST) & self.out.sum(-1).isfinite()
        self.q /= self.scale * LOG2E
        self.out.div_(self.total.unsqueeze(-1))
        for piece in self.rows.pieces(PIECE):
            if not bool(good[piece.start : piece.stop].all()):
                self.out[piece.start : piece.stop] = self.carefully(piece)
        return self.out

    def carefully(self, piece: Piece) -> Tensor:
        """A piece by torch's kernel: the keys that all of its rows see without a mask, the others under one."""
        start, stop, first, last = piece
        q, sight, tokens = self.q[start:stop], self.sight, self.rows.tokens[start:stop]
        if sight.pairs is not None:
            seen = sight.pairs[:, :last].index_select(0, tokens)
            low = int(seen.any(0).int().argmax())
            return self._library(q, slice(low, last), seen[:, low:])[0]
        all_see = self._library(q, slice(0, first), None)
        if first == last:
            return all_see[0]
        seen = torch.arange(first, last, device=q.device) < self.rows.ends[start:stop, None]
        return merge_states(*all_see, *self._library(q, slice(first, last), seen))[0]

    def _library(self, q: Tensor, keys: slice, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        mask = None if seen is None else seen[None, None]
        made = dense_with_lse(
            q[None, None], self.k[keys][None, None], self.v[keys][None, None], mask, self.scale, False
        )
        return made[0][0, 0], made[1][0, 0]


class Piecework:
    """What one thread does."""

    def __init__(self) -> None:
        self.buffer: Tensor | None = None

    def __call__(self, piece: tuple[Work, list[Piece]]) -> None:
        """Compute a piece, given in leaves."""
        work, leaves = piece
        if not work.powers:
            (leaf,) = leaves
            work.out[leaf.start : leaf.stop] = work.carefully(leaf)
            return
        # Sums of powers of two, and of values weighted by them: first over what all rows see.
        first = leaves[0].first
        some = slice(leaves[0].start, leaves[-1].stop)
        for low in range(0, first, STEP):
            self._add(work, some, low, min(first, low + STEP), None)
        for leaf in leaves:
            for low in range(first, leaf.last, STEP):
                self._add(work, slice(leaf.start, leaf.stop), low, min(leaf.last, low + STEP), leaf.first)

    def _add(self, work: Work, some: slice, low: int, high: int, edge: int | None) -> None:
        """Keys low..high; from ``edge`` on each row only up to its end."""
        q, out, total = work.q[some], work.out[some], work.total[some]
        p = self._logits(q, high - low)
        torch.mm(q, work.k[low:high].t(), out=p)
        p.exp2_()
        if edge is not None and edge < high:
            edge = max(low, edge)
            # 1 before the end of a row, 0 behind it. As products these are vectors; a masked fill is not.
            p[:, edge - low :].mul_((work.ends[some] - work.place[edge:high]).clamp_(0.0, 1.0))
        if low == 0:
            torch.sum(p, -1, out=total)
            torch.mm(p, work.v[low:high], out=out)
        else:
            total += p.sum(-1)
            torch.addmm(out, p, work.v[low:high], out=out)

    def _logits(self, q: Tensor, keys: int) -> Tensor:
        if self.buffer is None or self.buffer.dtype != q.dtype:
            self.buffer = torch.empty(PIECE * STEP, dtype=q.dtype, device=q.device)
        return self.buffer[: len(q) * keys].view(len(q), keys)
