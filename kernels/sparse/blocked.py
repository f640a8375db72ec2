"""Block-sparse attention in plain torch: gather the kept key blocks of a few query blocks, attend, go on.

Per (sample, head): query blocks with lists of equal length share one batched call on gathered keys and values; blocks
that attend to the same run of keys (all of them: text rows) are computed in place, without a gather. Ragged last key
blocks and partial blocks are attended separately and joined exactly through their log-sum-exp, so that the bulk of the
work carries no mask. Memory: O(one chunk); nothing of q, k or v is copied as a whole, and dropped keys are never read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import BlockLayout
from ..merge import merge_states
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

State = tuple[Tensor, Tensor]


def block_sparse_blocked(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float, num_splits: int = 1
) -> tuple[Tensor, Tensor]:
    """See :func:`patchkit.kernels.block_sparse_attention`; tensors are (B, H, N, D) views with contiguous D."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    lens = [layout.kv_len] * q.shape[0] if layout.kv_lens is None else [int(n) for n in layout.kv_lens.tolist()]
    lens = lens * q.shape[0] if len(lens) == 1 else lens
    plans: dict[tuple[int, int, int], list[Group]] = {}
    group = q.shape[1] // k.shape[1]
    on_cpu = q.device.type == "cpu"
    widen = on_cpu and q.dtype in (torch.bfloat16, torch.float16) and not native_low_precision()
    budget = max(layout.block_k, CHUNK_KEYS if on_cpu else DEVICE_CHUNK_KEYS)
    gather = Gather(min(budget, layout.n_q * layout.n_k * layout.block_k), k, layout.block_k, widen)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            key = (b if layout.batch > 1 else 0, h if layout.heads > 1 else 0, lens[b])
            if key not in plans:
                plans[key] = groups_of(layout, *key)
            keys, values = k[b, h // group, : lens[b]], v[b, h // group, : lens[b]]
            head = Head(q[b, h], keys, values, layout, scale, b, h, num_splits, gather, budget)
            for work in plans[key]:
                head.run(work, out[b, h], lse[b, h])
    return out, lse


class Head:
    """The work of one (sample, head): q (q_len, D), valid keys and values (kv, D), and the layout rows it follows."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: BlockLayout,
        scale: float,
        b: int,
        h: int,
        splits: int,
        gather: Gather,
        budget: int,
    ) -> None:
        self.q, self.k, self.v, self.layout, self.scale = q, k, v, layout, scale
        self.b = b
        self.lb, self.lh = (b if layout.batch > 1 else 0), (h if layout.heads > 1 else 0)
        self.splits, self.gather, self.budget = splits, gather, budget
        gather.bind(k, v)

    def run(self, work: Group, out: Tensor, lse: Tensor) -> None:
        """Compute all query blocks of ``work`` into out (q_len, D) and lse (q_len,)."""
        bq = self.layout.block_q
        per_call = max(1, CHUNK_ROWS // bq)
        for start in range(0, len(work.rows), per_call):
            rows = work.rows[start : start + per_call]
            r = min(bq, self.layout.q_len - rows[-1] * bq)
            consecutive = rows[-1] - rows[0] + 1 == len(rows)
            # A ragged last query block is always alone in its group, so a chunk has one block height r.
            if consecutive:
                where: slice | Tensor = slice(rows[0] * bq, rows[0] * bq + (len(rows) - 1) * bq + r)
                q = self.q[where]
            else:
                blocks = torch.tensor(rows, device=self.q.device)
                where = (blocks.unsqueeze(-1) * bq + torch.arange(r, device=self.q.device)).flatten()
                q = self.q.index_select(0, where)
            state = self._chunk(work, start, rows, q.unflatten(0, (len(rows), r)))
            if state is None:
                out[where], lse[where] = 0, float("-inf")
            else:
                out[where], lse[where] = state[0].flatten(0, 1).to(out.dtype), state[1].flatten()

    def _chunk(self, work: Group, start: int, rows: list[int], q: Tensor) -> State | None:
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
        """All rows of the chunk over keys lo..hi, read where they are."""
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
        c, r, _ = q.shape
        p = torch.tensor(rows, device=q.device)
        blocks = layout.part_idx[self.lb, self.lh].index_select(0, p)[:, :count].to(torch.int64)
        k_pos = (blocks.unsqueeze(-1) * bk + self.gather.token).flatten(1)
        inside = k_pos < self.k.shape[0]
        q_pos = p.unsqueeze(-1) * bq + torch.arange(r, device=q.device)
        ok = layout.rule.pairs(self.b, q_pos.unsqueeze(-1), k_pos.unsqueeze(1)) & inside.unsqueeze(1)
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
