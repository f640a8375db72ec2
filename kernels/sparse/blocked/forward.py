"""Block-sparse attention in plain torch: gather the kept key blocks of a few query blocks, multiply, go on.

A chunk of tiles (query blocks of any heads and samples that attend to equally many keys) is two batched products with
a power of two between them. No maximum is subtracted: fp32 holds exp(x) for any x that attention meets in practice, so
the sum of a row says afterwards whether it did, and the few tiles where it did not are computed again, carefully. Tiles
that share a run of keys (text rows attend to all) are read in place. Partial blocks are attended separately and joined
exactly through their log-sum-exp, so that the bulk of the work carries no mask.

Memory: a chunk per thread, and copies of q, k, v and the output of a few heads at a time (``operands.SPAN_BYTES``; one
head's where one is larger than that).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...layout import BlockLayout
from ...merge import merge_states
from ...threads import for_each
from .gather import Gather, Slot
from .operands import Operands, spans_of
from .tile import attend
from .tiles import Group, Partial, Plan, Run, plans_of

# Bytes of a chunk on a CPU (gathered keys and values, and logits), and the most keys of one tile at a time: long enough
# to hide its overhead, short enough to stay near the core.
CHUNK_BYTES, TILE_KEYS = 2560 * 1024, 2048
# An accelerator wants larger launches.
DEVICE_CHUNK_BYTES, DEVICE_TILE_KEYS = 256 * 2**20, 65536
# Query rows of a piece of work at most, and pieces per thread at least: enough to even out tiles of different length.
PIECE_ROWS, PIECES = 4096, 2
# Sums of powers of two within these limits lost nothing to overflow or underflow that fp32 would have kept.
LEAST, MOST = 2.0**-64, 2.0**100

State = tuple[Tensor, Tensor]


class Piece(NamedTuple):
    """Tiles a..b (counted in it) of one group, run, or set of query blocks with partial key blocks."""

    work: Group | Run | Partial
    a: int
    b: int


def block_sparse_blocked(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float, num_splits: int = 1
) -> tuple[Tensor, Tensor]:
    """See :func:`patchkit.kernels.block_sparse_attention`; tensors are (B, H, N, D) views with contiguous D."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    lens = [layout.kv_len] * q.shape[0] if layout.kv_lens is None else [int(n) for n in layout.kv_lens.tolist()]
    spans = spans_of(q, k)
    plans = plans_of(layout, spans, lens, q.shape[1] // k.shape[1])
    for span, plan in zip(spans, plans, strict=True):
        tensors = Operands(q, k, v, layout, span, scale, plan.order)
        total, base = _attend(tensors, plan, layout, num_splits, lens)
        at = slice(span.b0, span.b1), slice(span.h0, span.h1)
        tensors.finish(total, base, plan.place, out[at], lse[at])
    return out, lse


def _attend(
    tensors: Operands, plan: Plan, layout: BlockLayout, splits: int, lens: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Fill ``tensors.out``; return what to divide it by, and what to add to the logarithm of that (tiles, block_q)."""
    exact = torch.promote_types(tensors.dtype, torch.float32)
    total, base = tensors.q.new_zeros(2, *tensors.q.shape[:2], dtype=exact).unbind(0)
    tensors.out[plan.empty :] = 0
    device = tensors.q.device
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    tiles = min(max(1, PIECE_ROWS // layout.block_q), max(1, -(-tensors.q.shape[0] // (PIECES * threads))))

    def make_worker() -> Worker:
        return Worker(tensors, layout, total, base, splits, lens)

    first: list[Piece] = []
    works: list[Group | Run] = [*plan.runs, *plan.groups]
    for work in works:
        n = work.stop - work.start
        first += [Piece(work, a, min(n, a + tiles)) for a in range(0, n, tiles)]
    for_each(first, make_worker, device)
    if plan.partials:
        # Joined to what the full blocks gave, so only after them.
        for_each([Piece(work, 0, len(work.tiles)) for work in plan.partials], make_worker, device)
    return total, base


class Worker:
    """Computes pieces of one span; each thread has its own, with its own buffers."""

    def __init__(
        self, tensors: Operands, layout: BlockLayout, total: Tensor, base: Tensor, splits: int, lens: Sequence[int]
    ) -> None:
        self.tensors, self.layout, self.total, self.base = tensors, layout, total, base
        self.splits, self.lens = splits, lens
        bk, on_cpu = layout.block_k, total.device.type == "cpu"
        each = bk * (2 * tensors.k.shape[-1] + layout.block_q) * tensors.k.element_size()
        self.budget = max(1, (CHUNK_BYTES if on_cpu else DEVICE_CHUNK_BYTES) // each)
        self.most = min(self.budget, max(1, (TILE_KEYS if on_cpu else DEVICE_TILE_KEYS) // bk))
        self.gather = Gather(min(self.budget, total.shape[0] * layout.n_k), tensors.k, layout.block_q, bk)
        self.blocks = [x.view(-1, bk, x.shape[-1]) for x in (tensors.k, tensors.v)]
        self.lists = layout.kv_idx.reshape(-1, layout.kv_idx.shape[-1])
        # Products in low precision need the maximum subtracted, as torch's kernel does.
        self.careful = tensors.dtype in (torch.bfloat16, torch.float16)

    def __call__(self, piece: Piece) -> None:
        """Compute one piece into its tiles of the output, the totals and the bases."""
        work, a, b = piece
        if isinstance(work, Run):
            self._run(work, slice(work.start + a, work.start + b))
        elif isinstance(work, Partial):
            self._join_partial(work)
        else:
            self._group(work, a, b)

    def _run(self, work: Run, at: slice) -> None:
        """All rows of the tiles over keys lo..hi, read where they are."""
        q = self.tensors.q[at]
        state: State | None = None
        for lo, hi in split(work.lo, work.hi, self.splits):
            k, v = (x[work.kv_head, lo:hi].unsqueeze(0) for x in (self.tensors.k, self.tensors.v))
            o, lse = attend(q.reshape(1, -1, q.shape[-1]), k, v, self.tensors.scale)
            state = join(state, (o.view(q.shape), lse.view(q.shape[:2])))
        if state is not None:
            # Finished: nothing left to divide by, and the base is the LSE.
            self.tensors.out[at], self.total[at], self.base[at] = state[0], 1.0, state[1]

    def _group(self, work: Group, a: int, b: int) -> None:
        """Tiles over their own lists, as many a chunk as the budget allows."""
        at = slice(work.start + a, work.start + b)
        q, out, total = self.tensors.q[at], self.tensors.out[at], self.total[at]
        index = self.lists.index_select(0, work.rows[a:b])[:, : work.blocks] + work.first[a:b, None]
        parts = split(0, work.blocks, max(self.splits, -(-work.blocks // self.most)))
        step = max(1, self.budget // parts[0][1])
        if not self.careful:
            for some in range(0, b - a, step):
                c = slice(some, some + step)
                self._chunk(q[c], index[c], out[c], total[c], parts, work.tokens)
            # NaN compares false. A sum over the output finds an overflow of the weighted values.
            least, most = torch.aminmax(total)
            if float(least) >= LEAST and float(most) <= MOST and math.isfinite(float(out.sum())):
                return
            good = ((total >= LEAST) & (total <= MOST)).all(-1) & out.sum((1, 2)).isfinite()
            bad = (~good).nonzero().flatten()
        else:
            bad = torch.arange(b - a, device=index.device)
        for rows in bad.split(step) if len(bad) else ():
            state = self._careful(q.index_select(0, rows), index.index_select(0, rows), parts, work.tokens)
            out[rows], total[rows], self.base[at][rows] = state[0].to(out.dtype), 1.0, state[1].to(total.dtype)

    def _filled(self, index: Tensor, lo: int, hi: int, tokens: int) -> tuple[Slot, Tensor]:
        """Keys lo..hi (in blocks) of the listed tiles gathered; the values are left to the caller, with their index."""
        chosen = index[:, lo:hi].reshape(-1)
        slot = self.gather.slot(
            index.shape[0], hi - lo, min(tokens, hi * self.layout.block_k) - lo * self.layout.block_k
        )
        torch.index_select(self.blocks[0], 0, chosen, out=slot.raw_k)
        return slot, chosen

    def _chunk(
        self, q: Tensor, index: Tensor, out: Tensor, total: Tensor, parts: list[tuple[int, int]], tokens: int
    ) -> None:
        """Sums of powers of two ``total`` (c, r) and of values weighted by them ``out`` (c, r, D)."""
        for lo, hi in parts:
            slot, chosen = self._filled(index, lo, hi, tokens)
            torch.bmm(q, slot.k_t, out=slot.logits)
            slot.logits.exp2_()
            # Only now, so that the values are still near the core when they are multiplied.
            torch.index_select(self.blocks[1], 0, chosen, out=slot.raw_v)
            if lo == 0:
                torch.sum(slot.logits, -1, out=total)
                torch.bmm(slot.logits, slot.v, out=out)
            else:
                total += slot.logits.sum(-1)
                torch.baddbmm(out, slot.logits, slot.v, out=out)

    def _careful(self, q: Tensor, index: Tensor, parts: list[tuple[int, int]], tokens: int) -> State:
        """The same with the maximum subtracted, for tiles whose sums leave the range of fp32."""
        state: State | None = None
        for lo, hi in parts:
            slot, chosen = self._filled(index, lo, hi, tokens)
            torch.index_select(self.blocks[1], 0, chosen, out=slot.raw_v)
            state = join(state, attend(q, slot.k, slot.v, self.tensors.scale))
        assert state is not None
        return state

    def _join_partial(self, work: Partial) -> None:
        """Add the partial blocks of some tiles to what their full blocks gave."""
        tiles = work.tiles
        q = self.tensors.q.index_select(0, tiles)
        step = max(1, self.budget // work.count)
        parts = [self._partial(work, *x) for x in zip(q.split(step), work.rows.split(step), strict=True)]
        state = torch.cat([o for o, _ in parts]), torch.cat([x for _, x in parts])
        total, base = self.total.index_select(0, tiles), self.base.index_select(0, tiles)
        out = self.tensors.out.index_select(0, tiles) / total.masked_fill(total == 0, 1.0).unsqueeze(-1)
        out, lse = join((out, (total.log() + base).float()), state)
        self.tensors.out[tiles], self.total[tiles], self.base[tiles] = out.to(q.dtype), 1.0, lse.to(base.dtype)

    def _partial(self, work: Partial, q: Tensor, p: Tensor) -> State:
        """Query blocks ``p`` (c,) with rows q (c, r, D) over their partial key blocks, under the element rule."""
        layout, bq, bk, keys = self.layout, self.layout.block_q, self.layout.block_k, self.lens[work.b]
        assert layout.part_idx is not None
        b, h = (work.b if layout.batch > 1 else 0), (work.h if layout.heads > 1 else 0)
        blocks = layout.part_idx[b, h].index_select(0, p)[:, : work.count].to(torch.int64)
        k_pos = (blocks.unsqueeze(-1) * bk + torch.arange(bk, device=q.device)).flatten(1)
        q_pos = p.unsqueeze(-1) * bq + torch.arange(bq, device=q.device)
        ok = layout.rule.pairs(work.b, q_pos.unsqueeze(-1), k_pos.unsqueeze(1)) & (k_pos < keys).unsqueeze(1)
        bits = layout.partial_bits(b, h, p)
        if bits is not None:
            ok &= bits[:, : work.count].transpose(1, 2).flatten(2)
        # Positions past the end read the last valid key instead, so nothing behind it is ever used.
        tokens = k_pos.clamp(max=max(0, keys - 1)).flatten()
        heads = self.tensors.k[work.kv_head], self.tensors.v[work.kv_head]
        k, v = (x.index_select(0, tokens).unflatten(0, (p.shape[0], -1)) for x in heads)
        # A key that no row of its tile keeps counts as one that is not there, whatever stands in it: 0 * NaN is NaN.
        unused = ~ok.any(1).unsqueeze(-1)
        k, v = k.masked_fill(unused, 0), v.masked_fill(unused, 0)
        bias = torch.zeros(ok.shape, dtype=torch.float32, device=q.device).masked_fill_(~ok, float("-inf"))
        return attend(q, k, v, self.tensors.scale, bias)


def split(lo: int, hi: int, pieces: int) -> list[tuple[int, int]]:
    """Cut lo..hi into at most ``pieces`` ranges of nearly equal length, none empty."""
    step = -(-(hi - lo) // max(1, pieces))
    return [(a, min(hi, a + step)) for a in range(lo, hi, step)]


def join(a: State | None, b: State) -> State:
    """Exact union of two partial results over disjoint keys, kept in fp32."""
    return b if a is None else merge_states(a[0].float(), a[1], b[0], b[1])
