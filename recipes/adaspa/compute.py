"""From a choice of blocks to kernels: the dense pass with its LSE, the layout, the sparse pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from patchkit import kernels
from patchkit.context import AttentionCall
from patchkit.kernels.topk import index_dtype
from patchkit.recipes.adaspa.selection import Choice, Geometry

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


def make_layout(choice: Choice, geometry: Geometry, call: AttentionCall, heads: Heads) -> kernels.BlockLayout:
    """Index lists of the kept blocks. Rows with text and heads that are not selected are complete.

    The layout stores complete rows by their length alone, so they make no list longer. Waits for the device once, to
    learn how long the lists have to be: with heads of equal budgets they are a third shorter.
    """
    if choice.lists is None:
        return _layout_of_mask(choice, geometry, call, heads)
    device, (batch, count), n_q = call.q.device, call.q.shape[:2], geometry.counts[0]
    r0, r1 = geometry.rows
    valid = valid_blocks(geometry, batch, device)
    length = choice.k + (valid - choice.columns)  # (B, H'): text blocks come on top
    listed = length.masked_fill(length == valid, 0)
    rows = _with_text(choice, geometry, listed[..., None, None], max(1, int(listed.max())))
    num = valid.to(torch.int32)[..., None].repeat(1, count, n_q)
    num[:, heads, r0:r1] = length.to(torch.int32)[..., None]
    idx = rows
    if rows.shape[:3] != num.shape:
        idx = rows.new_zeros(*num.shape, rows.shape[-1])
        idx[:, heads, r0:r1] = rows
    return kernels.BlockLayout(
        *geometry.block, geometry.tokens, geometry.tokens, idx, num, kv_lens=lengths_tensor(geometry, device)
    ).assured()


def valid_blocks(geometry: Geometry, batch: int, device: torch.device) -> Tensor:
    """(B, 1): key blocks with real keys in each sample."""
    lengths = geometry.lengths or (geometry.tokens,) * batch
    return torch.tensor([[-(-n // geometry.block[1])] for n in lengths], device=device)


def _with_text(choice: Choice, geometry: Geometry, length: Tensor, width: int) -> Tensor:
    """(B, H', R, width) lists of video and text blocks, ascending, 0 from ``length`` (B, H', 1, 1) on.

    Text stands at one end, so its blocks come before or after those of the video.
    """
    assert choice.lists is not None
    first, after = geometry.columns
    slot = torch.arange(width, device=choice.k.device)
    behind = first + choice.k[..., None, None]  # the slot in which the text behind the video begins
    text = torch.where(slot < first, slot, slot - behind + after)
    text = text.masked_fill(slot >= length, 0).to(index_dtype(geometry.counts[1]))
    rows = text.expand(*choice.lists.shape[:3], width).contiguous()
    stored = min(choice.lists.shape[-1], width - first)
    if stored > 0:
        part, slot = rows[..., first : first + stored], slot[first : first + stored]
        video = (slot < behind) & (slot < length)
        part.copy_(torch.where(video, choice.lists[..., :stored] + first, part))
    return rows


def _layout_of_mask(choice: Choice, geometry: Geometry, call: AttentionCall, heads: Heads) -> kernels.BlockLayout:
    """:func:`make_layout` where rows differ in length: by a mask over all blocks."""
    blocks = geometry.with_text(choice.kept)
    if blocks.shape[1] != call.q.shape[1]:
        selected = blocks
        blocks = blocks.new_ones(blocks.shape[0], call.q.shape[1], *geometry.counts)
        blocks[:, heads] = selected
    return kernels.BlockLayout.from_bool(
        blocks,
        block_q=geometry.block[0],
        block_k=geometry.block[1],
        q_len=geometry.tokens,
        kv_len=geometry.tokens,
        kv_lens=lengths_tensor(geometry, call.q.device),
    )


def actual_density(layout: kernels.BlockLayout) -> Tensor:
    """(B, H): share of all real blocks that are computed, rows and columns of text included."""
    return layout.listed.sum(-1, dtype=torch.float32) / (layout.valid_blocks[..., 0] * layout.n_q)


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
    out, lse = dense_pass(q, k, v, geometry, scale)
    if call.mask is None and next is getattr(call.site, "terminal", None):
        one = next(call.replace(q=q[:1, :1], k=k[:1, :1], v=v[:1, :1]))
        if torch.equal(one, out[:1, :1]):
            return out, lse
    return next(call), lse


def dense_pass(q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, scale: float | None) -> tuple[Tensor, Tensor]:
    """Dense attention and its LSE. Padding is cut off instead of masked: a mask keeps torch from flash."""
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


def sparse(call: AttentionCall, geometry: Geometry, layout: kernels.BlockLayout) -> Tensor:
    """Attention over the kept blocks, renormalised; nothing stands in for what was dropped."""
    heads = call.q.shape[1]
    k, v = keys(call.k, geometry, heads), keys(call.v, geometry, heads)
    return kernels.block_sparse_attention(call.q, k, v, layout, scale=call.scale)


def all_heads(values: Tensor, call: AttentionCall, heads: Heads) -> Tensor:
    """Values of the selected heads (B, H') among all (B, H); the others keep everything."""
    out = values.new_ones(call.q.shape[0], call.q.shape[1])
    out[:, heads] = values
    return out
