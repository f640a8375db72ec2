"""Gradients of block-sparse attention in plain torch, along the same lists as the forward.

A piece of work is one KV head of one sample (or a fixed share of its query blocks): it visits the query blocks of all
heads of the group in a fixed order, recomputes their probabilities from the LSE, and adds to the gradients of the keys
in that order. So the sums do not depend on the number of threads, and nothing is accumulated by two of them. A pass
over the transposed lists would need no adding, but would compute logits and dO V^T twice: 7 matmuls instead of 5.
Memory: O(one chunk) per thread besides the gradients; the keys' gradients are held in fp32 while they are summed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...layout import BlockLayout
from ...threads import for_each
from .schedule import Group, groups_of

LOG2E = math.log2(math.e)
# Keys gathered per step, all rows of the chunk together: two tiles of logits of block_q x this stay in the cache.
CHUNK_KEYS = 4096
DEVICE_CHUNK_KEYS = 65536
# Query rows per step over a run of keys that is read in place, and keys per tile of it.
RUN_ROWS, RUN_KEYS = 512, 1024
# Few KV heads are cut into shares of their query blocks, each with sums of its own that are added in order at the end.
# These numbers, unlike the thread count, fix the result.
PIECES, MAX_SHARES = 8, 4

Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


class Inputs(NamedTuple):
    """What the gradients are computed from; see ``backward_reference``. ``lens``: valid keys of each sample."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    dout: Tensor | None
    dlse: Tensor | None
    layout: BlockLayout
    scale: float
    lens: list[int]


def block_sparse_backward_blocked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
    layout: BlockLayout,
    scale: float,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> Grads:
    """See ``backward_reference``; ``needs`` tells which of dq, dk, dv to compute, the others are None."""
    B, Hkv = k.shape[:2]
    lens = [layout.kv_len] * B if layout.kv_lens is None else [int(n) for n in layout.kv_lens.tolist()]
    work = torch.promote_types(q.dtype, torch.float32)
    shares = max(1, min(MAX_SHARES, PIECES // max(1, B * Hkv), layout.n_q))
    dq = q.new_empty(q.shape) if needs[0] else None
    sums = [k.new_zeros(shares, *k.shape, dtype=work) if need else None for need in needs[1:]]
    plans = {}
    for b in range(B):
        for h in range(q.shape[1]):
            key = (b if layout.batch > 1 else 0, h if layout.heads > 1 else 0, lens[b])
            if key not in plans:
                plans[key] = groups_of(layout, *key)
    inputs = Inputs(q, k, v, out, lse, dout, dlse, layout, scale, lens)
    pieces = [(b, g, share) for b in range(B) for g in range(Hkv) for share in range(shares)]
    for_each(pieces, lambda: Worker(inputs, plans, shares, dq, sums[0], sums[1]), q.device)
    dk, dv = (None if x is None else (x[0] if shares == 1 else x.sum(0)) for x in sums)
    if dk is not None:
        dk *= 1 / LOG2E
    return dq, None if dk is None else dk.to(k.dtype), None if dv is None else dv.to(v.dtype)


class Worker:
    """Computes pieces of one call; each thread has its own, with its own buffers."""

    def __init__(
        self,
        inputs: Inputs,
        plans: dict[tuple[int, int, int], list[Group]],
        shares: int,
        dq: Tensor | None,
        dk: Tensor | None,
        dv: Tensor | None,
    ) -> None:
        self.inputs, self.plans, self.shares = inputs, plans, shares
        self.dq, self.dk, self.dv = dq, dk, dv
        self.tile = Tile(inputs.q, dq is not None, dk is not None, dv is not None)
        self.token = torch.arange(inputs.layout.block_k, device=inputs.q.device)
        self.on_cpu = inputs.q.device.type == "cpu"
        self.budget = max(inputs.layout.block_k, CHUNK_KEYS if self.on_cpu else DEVICE_CHUNK_KEYS)

    def __call__(self, piece: tuple[int, int, int]) -> None:
        """All heads that share one KV head, every ``shares``-th chunk of their query blocks."""
        b, g, share = piece
        x, n = self.inputs, self.inputs.lens[piece[0]]
        group = x.q.shape[1] // x.k.shape[1]
        self.b, self.k, self.v = b, x.k[b, g, :n], x.v[b, g, :n]
        self.sum_k, self.sum_v = (None if s is None else s[share, b, g, :n] for s in (self.dk, self.dv))
        for h in range(g * group, (g + 1) * group):
            self.h = h
            plan = self.plans[b if x.layout.batch > 1 else 0, h if x.layout.heads > 1 else 0, n]
            for i, (work, start, stop) in enumerate(self._chunks(plan)):
                if i % self.shares == share:
                    self._chunk(work, start, stop)

    def _chunks(self, plan: list[Group]) -> Iterator[tuple[Group, int, int]]:
        """Rows start..stop of each group that are computed together."""
        bq, bk = self.inputs.layout.block_q, self.inputs.layout.block_k
        for work in plan:
            listed = work.part if work.full is None else max(work.part, work.full.shape[1])
            step = max(1, RUN_ROWS // bq) if work.run is not None else max(1, self.budget // max(1, listed * bk))
            step = min(step, max(1, len(work.rows) // self.shares))
            for start in range(0, len(work.rows), step):
                yield work, start, min(len(work.rows), start + step)

    def _chunk(self, work: Group, start: int, stop: int) -> None:
        """Gradients of the query blocks ``work.rows[start:stop]`` and their share in those of their keys."""
        x, rows = self.inputs, work.rows[start:stop]
        bq, bk, n = x.layout.block_q, x.layout.block_k, self.k.shape[0]
        # A ragged last query block is always alone in its group, so a chunk has one block height r.
        r = min(bq, x.layout.q_len - rows[-1] * bq)
        if rows[-1] - rows[0] + 1 == len(rows):
            where: slice | Tensor = slice(rows[0] * bq, rows[-1] * bq + r)
        else:
            blocks = torch.tensor(rows, device=x.q.device)
            where = (blocks.unsqueeze(-1) * bq + torch.arange(r, device=x.q.device)).flatten()
        self.tile.rows(x, self.b, self.h, where, len(rows))
        if work.run is not None:
            self._run(work.run[0] * bk, min(work.run[1] * bk, n))
        elif work.full is not None and work.full.shape[1]:
            width = max(1, self.budget // (bk * len(rows)))
            for listed in work.full[start:stop].split(width, dim=1):
                self._gathered(listed)
        if work.tail:
            self._run(n // bk * bk, n)
        if work.part:
            self._partial(rows, work.part, r)
        if self.dq is not None and self.tile.dq is not None:
            self.dq[self.b, self.h][where] = (self.tile.dq * x.scale).flatten(0, 1).to(self.dq.dtype)

    def _run(self, lo: int, hi: int) -> None:
        """All rows of the chunk over keys lo..hi, read where they are."""
        self.tile.join(True)
        for a in range(lo, hi, RUN_KEYS):
            keys = slice(a, min(hi, a + RUN_KEYS))
            dk, dv = self.tile.step(*(t[None, keys].to(self.tile.work) for t in (self.k, self.v)))
            for total, found in ((self.sum_k, dk), (self.sum_v, dv)):
                if total is not None and found is not None:
                    total[keys] += found[0]
        self.tile.join(False)

    def _gathered(self, blocks: Tensor) -> None:
        """The chunk's query blocks over their own key blocks (c, m), complete ones."""
        c, bk = blocks.shape[0], self.inputs.layout.block_k
        whole = self.k.shape[0] // bk
        # Gathering head slices of a (B, N, H, D) tensor block by block needs no copy of them first.
        k, v = (
            t[: whole * bk].unflatten(0, (whole, bk))[blocks].flatten(1, 2).to(self.tile.work) for t in (self.k, self.v)
        )
        for total, found in zip((self.sum_k, self.sum_v), self.tile.step(k, v), strict=True):
            if total is not None and found is not None:
                found = found.view(c, -1, bk * k.shape[-1])
                self._add(total[: whole * bk].view(whole, -1), blocks, found)

    def _partial(self, rows: list[int], count: int, r: int) -> None:
        """The chunk's query blocks over their ``count`` partial key blocks, under the element rule."""
        layout, bq, bk = self.inputs.layout, self.inputs.layout.block_q, self.inputs.layout.block_k
        assert layout.part_idx is not None
        lb, lh = (self.b if layout.batch > 1 else 0), (self.h if layout.heads > 1 else 0)
        n, device = self.k.shape[0], self.k.device
        p = torch.tensor(rows, device=device)
        blocks = layout.part_idx[lb, lh].index_select(0, p)[:, :count].to(torch.int64)
        k_pos = (blocks.unsqueeze(-1) * bk + self.token).flatten(1)
        q_pos = p.unsqueeze(-1) * bq + torch.arange(r, device=device)
        ok = layout.rule.pairs(self.b, q_pos.unsqueeze(-1), k_pos.unsqueeze(1)) & (k_pos < n).unsqueeze(1)
        bits = layout.partial_bits(lb, lh, p)
        if bits is not None:
            ok &= bits[:, :count, :r].transpose(1, 2).flatten(2)
        # Positions past the end stand for the last valid key, with probability 0: nothing behind it is ever loaded.
        tokens = k_pos.clamp(max=max(0, n - 1))
        # A key that no row of its tile keeps counts as one that is not there, whatever stands in it: 0 * NaN is NaN.
        unused = ~ok.any(1).unsqueeze(-1)
        k, v = (t[tokens].to(self.tile.work).masked_fill_(unused, 0) for t in (self.k, self.v))
        for total, found in zip((self.sum_k, self.sum_v), self.tile.step(k, v, ok), strict=True):
            if total is not None and found is not None:
                past = (k_pos >= n).unsqueeze(-1)
                if self.on_cpu:
                    total.index_add_(0, tokens.flatten(), found.masked_fill_(past, 0).flatten(0, 1))
                else:
                    for at, keep, add in zip(tokens, ~past[..., 0], found, strict=True):
                        total[at[keep]] += add[keep]

    def _add(self, total: Tensor, blocks: Tensor, found: Tensor) -> None:
        """Add ``found`` (c, m, x) to rows ``blocks`` (c, m) of ``total``, in that order."""
        if self.on_cpu:
            total.index_add_(0, blocks.flatten(), found.flatten(0, 1))
            return
        # Elsewhere index_add_ adds in any order where an index repeats, which it does not within a query block.
        for at, add in zip(blocks, found, strict=True):
            total.index_add_(0, at, add)


class Tile:
    """The arithmetic on one chunk: c query blocks of r rows, each with m keys of its own (or c = 1 for all rows).

    The tiles of logits are allocated once per thread: fresh ones of this size would cost page faults in every step.
    """

    def __init__(self, q: Tensor, need_q: bool, need_k: bool, need_v: bool) -> None:
        self.work = torch.promote_types(q.dtype, torch.float32)
        self.need_q, self.need_k, self.need_v = need_q, need_k, need_v
        self.buffers: dict[str, Tensor] = {}
        self.empty = q.new_empty(0, dtype=self.work)
        self.dq: Tensor | None = None

    def rows(self, x: Inputs, b: int, h: int, where: slice | Tensor, c: int) -> None:
        """Load the rows ``where`` of sample ``b`` and head ``h`` as c blocks."""

        def read(t: Tensor) -> Tensor:
            return t[b, h][where].to(self.work).unflatten(0, (c, -1))

        # Base-2 exponents, as exp2 is the cheaper function; dk takes the factor back at the end.
        self.q = read(x.q) * (x.scale * LOG2E)
        lse = read(x.lse).unsqueeze(-1)
        dead = lse == float("-inf")
        # exp2(x - inf) = 0: rows without keys take no part, whatever the gradient of their LSE is.
        self.shift = (lse * LOG2E).masked_fill_(dead, float("inf"))
        self.delta = torch.zeros_like(lse)
        self.do = None
        if x.dout is not None:
            self.do = read(x.dout)
            self.delta += (self.do * read(x.out)).sum(-1, keepdim=True)
        if x.dlse is not None:
            self.delta -= read(x.dlse).unsqueeze(-1).masked_fill(dead, 0)
        self.dq = torch.zeros_like(self.q) if self.need_q else None

    def join(self, flat: bool) -> None:
        """View the c blocks as one of c * r rows, or again as c blocks."""
        if flat:
            self.shape = self.q.shape[:2]
        shape = (1, -1) if flat else self.shape
        for name in ("q", "do", "shift", "delta", "dq"):
            t = getattr(self, name)
            setattr(self, name, None if t is None else t.view(*shape, t.shape[-1]))

    def step(self, k: Tensor, v: Tensor, ok: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """Add to dq what keys k, v (c, m, D) give; return theirs, (c, m, D), valid until the next call."""
        p = self._bmm("p", self.q, k.mT).sub_(self.shift).exp2_()
        if ok is not None:
            p.masked_fill_(~ok, 0)
        dk = dv = None
        if self.need_v:
            dv = p.new_zeros(v.shape) if self.do is None else self._bmm("dv", p.mT, self.do)
        if self.need_q or self.need_k:
            if self.do is None:
                ds = p.mul_(-self.delta)
            else:
                ds = self._bmm("ds", self.do, v.mT).sub_(self.delta).mul_(p)
            if self.dq is not None:
                self.dq.baddbmm_(ds, k)
            if self.need_k:
                dk = self._bmm("dk", ds.mT, self.q)
        return dk, dv

    def _bmm(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """a @ b in a buffer of that name."""
        shape = (a.shape[0], a.shape[1], b.shape[2])
        n = math.prod(shape)
        if self.buffers.get(name, self.empty).numel() < n:
            self.buffers[name] = self.empty.new_empty(n)
        return torch.bmm(a, b, out=self.buffers[name][:n].view(shape))
