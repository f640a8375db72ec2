"""The dense pass with its LSE, and the sparse op put together from video rows, text rows and unselected heads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from patchkit.recipes.adaspa.selection import Choice, Geometry
from torch import Tensor

from patchkit import kernels
from patchkit.context import AttentionCall

Heads = slice | Tensor


def pick_heads(numbers: frozenset[int], call: AttentionCall) -> Heads:
    """An index for the head dimension; a slice, which copies nothing, where the numbers allow it."""
    wanted = sorted(numbers)
    if not wanted or wanted[-1] - wanted[0] + 1 == len(wanted):
        return slice(wanted[0], wanted[-1] + 1) if wanted else slice(0, 0)
    return torch.tensor(wanted, device=call.q.device)


def keys(x: Tensor, geometry: Geometry, heads: int) -> Tensor:
    """Keys or values in the geometry's order, one head for each query head."""
    if x.shape[1] != heads:
        x = x.repeat_interleave(heads // x.shape[1], 1)
    return x.roll(-geometry.shift, 2) if geometry.shift else x


def lengths_tensor(geometry: Geometry, device: torch.device) -> Tensor | None:
    """Real keys per sample as the kernels take them."""
    if geometry.lengths is None:
        return None
    return torch.tensor(geometry.lengths, dtype=torch.int32, device=device)


def real_queries(geometry: Geometry, device: torch.device) -> Tensor:
    """(B, tokens) bool: queries that are no padding. Padding of the keys is padding of the queries here."""
    lengths = lengths_tensor(geometry, device)
    assert lengths is not None
    real = torch.arange(geometry.tokens, device=device) < lengths[:, None]
    return real.roll(geometry.shift, -1)


def make_layout(choice: Choice, geometry: Geometry, device: torch.device) -> kernels.BlockLayout:
    """The kept blocks of the rows without text, as index lists; text blocks are in every row."""
    return kernels.BlockLayout.from_bool(
        geometry.with_text(choice.kept),
        block_q=geometry.block[0],
        block_k=geometry.block[1],
        q_len=len(geometry.span),
        kv_len=geometry.tokens,
        kv_lens=lengths_tensor(geometry, device),
    )


def actual_density(layout: kernels.BlockLayout, geometry: Geometry) -> Tensor:
    """(B, H): share of all real blocks that are computed, rows and columns of text included."""
    video = layout.kv_num.sum(-1, dtype=torch.float32)
    real = torch.tensor(geometry.real_blocks(), dtype=torch.float32, device=video.device)[:, None]
    rows = geometry.counts[0]
    return (video + (rows - layout.kv_num.shape[-1]) * real) / (rows * real)


def dense_with_lse(
    call: AttentionCall, next: Callable[[AttentionCall], Tensor], geometry: Geometry
) -> tuple[Tensor, Tensor]:
    """The model's own output, to the bit, and the LSE (B, H, N) of the same attention.

    Which kernel the model's op takes is the device's, torch's and the user's choice (``set_attention_backend``), and
    of those that torch offers, not all give their LSE. So one head is computed with the model's own op and compared
    with that head of our dense pass: heads do not interact, so equal bits mean the same kernel, and our output is the
    model's. This is so on CPU and wherever torch takes its flash kernel. Otherwise (a mask, another backend, a recipe
    inside this one) the model's op gives the output, and the dense pass only the LSE: one dense attention more a run.
    """
    q, scale = call.q, call.scale
    k, v = keys(call.k, geometry, q.shape[1]), keys(call.v, geometry, q.shape[1])
    out, lse = dense_rows(q, k, v, geometry, scale)
    if call.mask is None and next is getattr(call.site, "terminal", None):
        one = next(call.replace(q=q[:1, :1], k=k[:1, :1], v=v[:1, :1]))
        if torch.equal(one, out[:1, :1]):
            return out, lse
    return next(call), lse


def dense_rows(q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, scale: float | None) -> tuple[Tensor, Tensor]:
    """Dense attention of some rows and its LSE. Padding is cut off instead of masked: a mask keeps torch from flash."""
    if geometry.lengths is None:
        return kernels.dense_attention(q, k, v, scale=scale, return_lse=True)
    if len(set(geometry.lengths)) == 1:
        n = geometry.lengths[0]
        return kernels.dense_attention(q, k[:, :, :n], v[:, :, :n], scale=scale, return_lse=True)
    parts = [
        kernels.dense_attention(q[i : i + 1], k[i : i + 1, :, :n], v[i : i + 1, :, :n], scale=scale, return_lse=True)
        for i, n in enumerate(geometry.lengths)
    ]
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs), torch.cat(lses)


def sparse(call: AttentionCall, geometry: Geometry, layout: kernels.BlockLayout, heads: Heads) -> Tensor:
    """Kept blocks for the video rows of the selected heads, everything for the other rows and heads.

    Rows with text see all keys. They run apart, because one list of full length would make every list as long.
    """
    q, count = call.q, call.q.shape[1]
    k, v = keys(call.k, geometry, count), keys(call.v, geometry, count)
    start, stop = geometry.span
    video = q[:, :, start:stop]
    out = kernels.block_sparse_attention(video[:, heads], k[:, heads], v[:, heads], layout, scale=call.scale)
    if out.shape[1] != count:
        chosen = torch.zeros(count, dtype=torch.bool, device=q.device)
        chosen[heads] = True
        rest = (~chosen).nonzero()[:, 0]
        whole = out.new_empty(out.shape[0], count, *out.shape[2:])
        whole[:, heads] = out
        whole[:, rest] = dense_rows(video[:, rest], k[:, rest], v[:, rest], geometry, call.scale)[0]
        out = whole
    if (start, stop) == (0, geometry.tokens):
        return out
    text = [dense_rows(part, k, v, geometry, call.scale)[0] for part in (q[:, :, :start], q[:, :, stop:])]
    return torch.cat([text[0], out, text[1]], dim=2)
