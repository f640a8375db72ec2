"""Block-sparse attention in plain torch: gather the kept key blocks of a few query blocks, attend, go on.

Per (sample, head): query blocks with lists of equal length share one batched call on gathered keys and values; blocks
that attend to the same run of keys (all of them: text rows) are computed in place, without a gather. Ragged last key
blocks and partial blocks are attended separately and joined exactly through their log-sum-exp, so that the bulk of the
work carries no mask. Memory: O(one chunk) per thread; nothing of q, k or v is copied as a whole, and dropped keys are
never read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..layout import BlockLayout
from ..merge import merge_states
from ..threads import for_each
from .gather import Gather
from .schedule import Group, groups_of
from .tile import attend, native_low_precision

# Keys gathered per call on a CPU (all rows of the chunk together): K and V of a chunk stay near the core, while one
# call is long enough to hide its overhead. Measured best between 3,000 and 6,000 for D = 64 and 128.
CHUNK_KEYS = 4096
# Query rows that are read, attended and written back together.
CHUNK_ROWS = 1024
# An accelerator wants larger launches; this bounds its logits to 64 Mi entries.
DEVICE_CHUNK_KEYS = 65536
# Pieces of work per thread: enough to even out heads of different density.
PIECES = 4

State = tuple[Tensor, Tensor]


class Piece(NamedTuple):
    """Rows start..stop of one group, in sample ``b`` and head ``h``."""

    b: int
    h: int
    work: Group
    start: int
    stop: int


def block_sparse_blocked(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float, num_splits: int = 1
) -> tuple[Tensor, Tensor]:
    """See :func:`patchkit.kernels.block_sparse_attention`; tensors are (B, H, N, D) views with contiguous D."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    B, H = q.shape[:2]
    lens = [layout.kv_len] * B if layout.kv_lens is None else [int(n) for n in layout.kv_lens.tolist()]
    threads = torch.get_num_threads() if q.device.type == "cpu" else 1
    rows = min(max(1, CHUNK_ROWS // layout.block_q), max(1, B * H * layout.n_q // (PIECES * threads)))
    plans: dict[tuple[int, int, int], list[Group]] = {}
    pieces = []
    for b in range(B):
        for h in range(H):
            key = (b if layout.batch > 1 else 0, h if layout.heads > 1 else 0, lens[b])
            if key not in plans:
                plans[key] = groups_of(layout, *key)
            for work in plans[key]:
                total = len(work.rows)
                pieces += [Piece(b, h, work, a, min(total, a + rows)) for a in range(0, total, rows)]
    for_each(pieces, lambda: Worker(q, k, v, layout, scale, num_splits, lens, out, lse), q.device)
    return out, lse


class Worker:
    """Computes pieces of one call; each thread has its own, with its own buffers."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: BlockLayout,
        scale: float,
        splits: int,
        lens: list[int],
        out: Tensor,
        lse: Tensor,
    ) -> None:
        self.tensors, self.layout, self.scale, self.splits, self.lens = (q, k, v), layout, scale, splits, lens
        self.out, self.lse = out, lse
        on_cpu = q.device.type == "cpu"
        widen = on_cpu and q.dtype in (torch.bfloat16, torch.float16) and not native_low_precision()
        self.budget = max(layout.block_k, CHUNK_KEYS if on_cpu else DEVICE_CHUNK_KEYS)
        capacity = min(self.budget, layout.n_q * layout.n_k * layout.block_k)
        self.gather = Gather(capacity, k, layout.block_k, widen)
        self.at: tuple[int, int] | None = None

    def _bind(self, b: int, h: int) -> None:
        """Turn to sample ``b`` and head ``h``: q (q_len, D), valid keys and values (kv, D)."""
        if self.at == (b, h):
            return
        q, k, v = self.tensors
        head = h // (q.shape[1] // k.shape[1])
        self.q, self.k, self.v = q[b, h], k[b, head, : self.lens[b]], v[b, head, : self.lens[b]]
        self.lb, self.lh = (b if self.layout.batch > 1 else 0), (h if self.layout.heads > 1 else 0)
        self.gather.bind(self.k, self.v)
        self.at = (b, h)

    def __call__(self, piece: Piece) -> None:
        """Compute one piece into its rows of out and lse."""
        b, h, work, start, stop = piece
        self._bind(b, h)
        bq = self.layout.block_q
        rows = work.rows[start:stop]
        # A ragged last query block is always alone in its group, so a piece has one block height r.
        r = min(bq, self.layout.q_len - rows[-1] * bq)
        if rows[-1] - rows[0] + 1 == len(rows):
            where: slice | Tensor = slice(rows[0] * bq, rows[-1] * bq + r)
            q = self.q[where]
        else:
            blocks = torch.tensor(rows, device=self.q.device)
            where = (blocks.unsqueeze(-1) * bq + torch.arange(r, device=self.q.device)).flatten()
            q = self.q.index_select(0, where)
        state = self._attend(work, start, rows, q.unflatten(0, (len(rows), r)))
        out, lse = self.out[b, h], self.lse[b, h]
        if state is None:
            out[where], lse[where] = 0, float("-inf")
        else:
            out[where], lse[where] = state[0].flatten(0, 1).to(out.dtype), state[1].flatten()

    def _attend(self, work: Group, start: int, rows: list[int], q: Tensor) -> State | None:
        """Attention of query blocks q (c, r, D), or None if they have no keys."""
        state: State | None = None
        bk, kv = self.layout.block_k, self.k.shape[0]
        if work.run is not None:
            for lo, hi in split(*work.run, self.splits):
                state = join(state, self._in_place(q, lo * bk, min(hi * bk, kv)))
        elif work.full is not None and work.full.shape[1]:
            listed = work.full[start : start + len(rows)]
            pieces = max(self.splits, -(-listed.shape[1] // (self.budget // bk)))
            for lo, hi in split(0, listed.shape[1], pieces):
                state = join(state, self._gathered(q, listed[:, lo:hi]))
        if work.tail:
            state = join(state, self._in_place(q, kv // bk * bk, kv))
        if work.part:
            step = max(1, self.budget // (work.part * bk))
            parts = [self._partial(q[a : a + step], rows[a : a + step], work.part) for a in range(0, len(rows), step)]
            state = join(state, (torch.cat([o for o, _ in parts]), torch.cat([x for _, x in parts])))
        return state

    def _in_place(self, q: Tensor, lo: int, hi: int) -> State:
        """All rows of the piece over keys lo..hi, read where they are."""
        c, r, d = q.shape
        o, lse = attend(q.reshape(1, c * r, d), self.k[None, lo:hi], self.v[None, lo:hi], self.scale)
        return o.view(c, r, d), lse.view(c, r)

    def _gathered(self, q: Tensor, blocks: Tensor) -> State:
        """Query blocks (c, r, D) over their own key blocks (c, m), complete ones; as many rows a call as fit."""
        q = q.to(self.gather.dtype)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        m = blocks.shape[1]
        step = max(1, self.budget // (m * self.layout.block_k))
        for q_part, listed, o, part_lse in zip(*(x.split(step) for x in (q, blocks, out, lse)), strict=True):
            slot = self.gather.slot(q_part.shape[0], m)
            self.gather.fill(slot, self.gather.index(listed))
            found = attend(q_part, slot.k, slot.v, self.scale)
            o.copy_(found[0])
            part_lse.copy_(found[1])
        return out, lse

    def _partial(self, q: Tensor, rows: list[int], count: int) -> State:
        """Query blocks over their ``count`` partial key blocks, under the element rule."""
        layout, bq, bk = self.layout, self.layout.block_q, self.layout.block_k
        assert layout.part_idx is not None
        assert self.at is not None
        c, r, _ = q.shape
        p = torch.tensor(rows, device=q.device)
        blocks = layout.part_idx[self.lb, self.lh].index_select(0, p)[:, :count].to(torch.int64)
        k_pos = (blocks.unsqueeze(-1) * bk + self.gather.token).flatten(1)
        inside = k_pos < self.k.shape[0]
        q_pos = p.unsqueeze(-1) * bq + torch.arange(r, device=q.device)
        ok = layout.rule.pairs(self.at[0], q_pos.unsqueeze(-1), k_pos.unsqueeze(1)) & inside.unsqueeze(1)
        bits = layout.partial_bits(self.lb, self.lh, p)
        if bits is not None:
            ok &= bits[:, :count, :r].transpose(1, 2).flatten(2)
        # Positions past the end read the last valid key instead, so nothing behind it is ever loaded.
        tokens = k_pos.clamp(max=max(0, self.k.shape[0] - 1)).flatten()
        k, v = (x.index_select(0, tokens).unflatten(0, (c, -1)) for x in (self.k, self.v))
        bias = torch.zeros(ok.shape, dtype=torch.float32, device=q.device).masked_fill_(~ok, float("-inf"))
        return attend(q, k, v, self.scale, bias)


def split(lo: int, hi: int, pieces: int) -> list[tuple[int, int]]:
    """Cut lo..hi into at most ``pieces`` ranges of nearly equal length, none empty."""
    step = -(-(hi - lo) // max(1, pieces))
    return [(a, min(hi, a + step)) for a in range(lo, hi, step)]


def join(a: State | None, b: State) -> State:
    """Exact union of two partial results over disjoint keys, kept in fp32."""
    return b if a is None else merge_states(a[0].float(), a[1], b[0], b[1])
