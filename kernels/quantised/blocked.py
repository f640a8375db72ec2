"""Quantised attention in plain torch: the rounding is simulated, many query tiles at a time.

A CPU has nothing to gain from it. Where only Q and K are rounded, they are rounded and multiplied out again, and the
ordinary operators do the rest. Where P is rounded, tiles walk over their lists of key blocks in step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..layout import BlockLayout
from ..threads import for_each
from .formats import K_GROUP, LARGEST, LARGEST_FP8, LN2, LOG2E, P_ROWS, Format, fp8, rounded, scale_of
from .operands import Keys, Values, groups_of, keys_of, values_of

# Entries of the map that one thread holds at a time.
TILE, DEVICE_TILE = 256 * 1024, 32 * 2**20


def quantised_blocked(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, form: Format, scale: float
) -> tuple[Tensor, Tensor]:
    """See :func:`patchkit.kernels.quantised_attention`; tensors are (B, H, N, D)."""
    lens = None if layout.kv_lens is None else [int(n) for n in layout.kv_lens.tolist()]
    groups = groups_of(layout.block_q, layout.block_k)
    keys = None if form.qk == "none" else keys_of(q, k, form, groups, scale, lens)
    exact_q, exact_k, factor = (q, k, scale) if keys is None else (*_multiplied_out(keys, q, k, groups), LN2)
    if form.pv == "none":
        from ..sparse import block_sparse_attention

        wide = torch.promote_types(exact_q.dtype, v.dtype)
        wide_q, wide_k, wide_v = (x.to(wide) for x in (exact_q, exact_k, v))
        out, lse = block_sparse_attention(wide_q, wide_k, wide_v, layout, scale=factor, return_lse=True, validate=False)
    else:
        values = values_of(v, form, lens)
        out, lse = _walk(exact_q.float() * (factor * LOG2E), exact_k.float(), values, layout, form, lens)
    if keys is not None and keys.shift is not None:
        lse = lse + keys.shift
    return out.to(q.dtype), lse


def _multiplied_out(keys: Keys, q: Tensor, k: Tensor, groups: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Rounded queries and keys in fp32: their products are the quantised logits."""
    wide_q = keys.q.float().unflatten(2, (-1, groups[0])) * keys.q_scale[..., None, None]
    wide_k = keys.k.float().unflatten(2, (-1, groups[1])) * keys.k_scale[..., None, None]
    return wide_q.flatten(2, 3)[:, :, : q.shape[2]], wide_k.flatten(2, 3)[:, :, : k.shape[2]]


def _walk(
    q: Tensor, k: Tensor, values: Values, layout: BlockLayout, form: Format, lens: list[int] | None
) -> tuple[Tensor, Tensor]:
    """Output and LSE with P rounded; q carries scale * log2(e)."""
    B, H, N, D = q.shape
    group, rows, step = H // k.shape[1], min(P_ROWS, layout.block_q), min(K_GROUP, layout.block_k)
    out = torch.zeros(B, H, N, D, dtype=torch.float32, device=q.device)
    lse = torch.full((B, H, N), float("-inf"), device=q.device)
    entries = TILE if q.device.type == "cpu" else DEVICE_TILE
    most = max(1, entries // (rows * step))
    tiles = -(-N // rows)
    work = [(b, h, at) for b in range(B) for h in range(H) for at in range(0, tiles, most)]

    def make_worker() -> Callable[[tuple[int, int, int]], None]:
        return attend

    def attend(item: tuple[int, int, int]) -> None:
        b, h, at = item
        here = slice(at * rows, min(N, (at + most) * rows))
        count, kv = (layout.kv_len if lens is None else lens[b]), h // group
        lists, num = steps_of(layout, b, h, range(at, min(tiles, at + most)), rows, step)
        chunk = Chunk(q[b, h, here], k[b, kv, :count], values.v[b, kv, :count], rows, step, form)
        o, top = chunk.run(lists, num)
        o = o * values.scale[b, kv]
        if values.mean is not None:
            o = torch.where(top.isneginf()[:, None], o, o + values.mean[b, kv])
        out[b, h, here], lse[b, h, here] = o, top

    for_each(work, make_worker, q.device)
    return out, lse


def steps_of(layout: BlockLayout, b: int, h: int, tiles: range, rows: int, step: int) -> tuple[Tensor, Tensor]:
    """The lists of some tiles of ``rows`` queries in steps of ``step`` keys: (tiles, steps) and counts (tiles,)."""
    b, h = (b if layout.batch > 1 else 0), (h if layout.heads > 1 else 0)
    at = torch.arange(tiles.start, tiles.stop, device=layout.device) * rows // layout.block_q
    num = layout.kv_num[b, h, at]
    valid = layout.valid_blocks[b if layout.valid_blocks.shape[0] > 1 else 0].flatten()
    longest = max(1, int(num.max()))
    implicit = torch.arange(longest, device=layout.device).expand(len(tiles), -1)
    listed = layout.kv_idx[b, h, at, :longest].long()
    listed = torch.nn.functional.pad(listed, (0, longest - listed.shape[1]))
    lists = torch.where((num == valid)[:, None], implicit, listed)
    parts = layout.block_k // step
    inner = torch.arange(parts, device=layout.device)
    return (lists[..., None] * parts + inner).flatten(1), num * parts


class Chunk:
    """Some query tiles of one head: q (n, D), k and v (keys, D)."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, rows: int, step: int, form: Format) -> None:
        self.count, self.form, self.step, self.keys = q.shape[0], form, step, k.shape[0]
        self.q = torch.nn.functional.pad(q, (0, 0, 0, -q.shape[0] % rows)).unflatten(0, (-1, rows))
        tail = (0, 0, 0, -self.keys % step)
        self.k, self.v = (torch.nn.functional.pad(x, tail).unflatten(0, (-1, step)) for x in (k, v))
        self.live = torch.arange(self.q.shape[0] * rows, device=q.device).view(-1, rows) < q.shape[0]

    def run(self, lists: Tensor, num: Tensor) -> tuple[Tensor, Tensor]:
        """Output (n, D) before the values' scales, and natural-log LSE (n,)."""
        m = torch.full(self.q.shape[:2], float("-inf"), device=self.q.device)
        total, acc = torch.zeros_like(m), torch.zeros_like(self.q[..., :1]).expand(-1, -1, self.v.shape[-1]).clone()
        inside = torch.arange(self.step, device=self.q.device)
        for t in range(lists.shape[1]):
            seen = (lists[:, t, None] * self.step + inside < self.keys) & (t < num)[:, None]
            if not bool(seen.any()):
                continue  # counts fall short of t, or this part of a block lies behind the last key
            block = lists[:, t].clamp(max=self.k.shape[0] - 1)
            s = self.q @ self.k[block].transpose(-1, -2)
            s = s.masked_fill(~seen[:, None], float("-inf"))
            top = torch.maximum(m, s.amax(-1))
            base = top.masked_fill(top == float("-inf"), 0.0)
            p, alpha = (s - base[..., None]).exp2(), (m - base).exp2()
            total = total * alpha + p.sum(-1)
            p = p.masked_fill(~self.live[..., None], 0.0)  # rows past the end must not set the scale of a block
            acc = acc * alpha[..., None] + self._product(p, self.v[block])
            m = top
        out = acc / total.masked_fill(total == 0, 1.0)[..., None]
        lse = (m + total.log2()) * LN2
        return out.flatten(0, 1)[: self.count], lse.flatten()[: self.count]

    def _product(self, p: Tensor, v: Tensor) -> Tensor:
        if self.form.pv == "fp8":
            return fp8(p * LARGEST_FP8) @ v / LARGEST_FP8
        top = LARGEST[self.form.pv]
        if self.form.p_scale == "static":
            return rounded(p, 1 / top, top) @ v / top
        dims = (-1,) if self.form.p_scale == "row" else (-1, -2)
        step = scale_of(p.amax(dims, keepdim=True), top)
        return (rounded(p, step, top) @ v) * step
