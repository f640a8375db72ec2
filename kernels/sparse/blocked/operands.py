"""The operands of one span as the blocked path wants them: whole blocks, contiguous, in the dtype it multiplies in."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...layout import BlockLayout
from .tile import native_low_precision
from .tiles import Span

LOG2E, LN2 = math.log2(math.e), math.log(2)
# Memory for the copies of q, k, v and of the output of one span; at least one KV head's whatever its size.
SPAN_BYTES = 32 * 2**20


def compute_dtype(q: Tensor) -> torch.dtype:
    """Dtype of the products: fp32 for low precision, unless the CPU multiplies that in hardware."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return q.dtype
    return q.dtype if q.device.type == "cpu" and native_low_precision() else torch.float32


def spans_of(q: Tensor, k: Tensor, budget: int = SPAN_BYTES) -> list[Span]:
    """Cut samples and heads so that the copies of a span fit in ``budget`` bytes; whole samples where one fits."""
    B, H, n, d = q.shape
    kv_heads = k.shape[1]
    share = H // kv_heads
    each = 2 * 4 * d * (k.shape[2] + share * n)
    fit = max(1, budget // max(1, each))
    if fit >= kv_heads:
        step = fit // kv_heads
        return [Span(b, min(B, b + step), 0, H) for b in range(0, B, step)]
    return [
        Span(b, b + 1, h * share, min(kv_heads, h + fit) * share) for b in range(B) for h in range(0, kv_heads, fit)
    ]


class Operands:
    """Tensors of one span.

    Attributes:
        q: (tiles, block_q, D) in the plan's order, times scale * log2(e), so that the softmax is a power of two; as it
            is in low precision, which would lose bits. Rows past the end are 0.
        scale: what remains to be multiplied.
        k: (KV heads, Nk * block_k, D); what lies past the end is never used.
        v: as ``k``.
        out: (tiles, block_q, D) in the plan's order, to be filled.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, span: Span, scale: float, order: Tensor
    ) -> None:
        share = q.shape[1] // k.shape[1]
        samples, kv_heads = slice(span.b0, span.b1), slice(span.h0 // share, span.h1 // share)
        self.dtype, self.q_len = compute_dtype(q), q.shape[2]
        q = q[samples, span.h0 : span.h1]
        padded = q.new_empty(*q.shape[:2], layout.n_q * layout.block_q, q.shape[3], dtype=self.dtype)
        # Copied first: torch would round a product of low-precision numbers before it widens it.
        padded[:, :, : self.q_len] = q
        self.scale = scale
        if self.dtype not in (torch.bfloat16, torch.float16):
            padded[:, :, : self.q_len] *= scale * LOG2E
            self.scale = LN2
        padded[:, :, self.q_len :] = 0
        self.shape = padded.shape
        self.out = padded.view(-1, layout.block_q, q.shape[3])
        self.q = self.out.index_select(0, order)
        self.k, self.v = (self._whole(x[samples, kv_heads], layout.n_k * layout.block_k) for x in (k, v))

    def _whole(self, x: Tensor, rows: int) -> Tensor:
        """x (b, h, n, D) as (b * h, rows, D), copied where it has another dtype, other strides or a ragged end."""
        if x.dtype != self.dtype or x.shape[2] != rows or not x.is_contiguous():
            copy = x.new_empty(*x.shape[:2], rows, x.shape[3], dtype=self.dtype)
            copy[:, :, : x.shape[2]] = x
            x = copy
        return x.flatten(0, 1)

    def finish(self, total: Tensor, base: Tensor, place: Tensor, out: Tensor, lse: Tensor) -> None:
        """Divide the output by ``total`` and put it and the LSE where they belong: (b, h, q_len[, D])."""
        self.out.div_(total.masked_fill(total == 0, 1.0).unsqueeze(-1))
        # q is done with; its memory takes the output in the order of the heads.
        torch.index_select(self.out, 0, place, out=self.q)
        out.copy_(self.q.view(self.shape)[:, :, : self.q_len])
        logs = total.log().add_(base).index_select(0, place)
        lse.copy_(logs.view(self.shape[:3])[:, :, : self.q_len])
