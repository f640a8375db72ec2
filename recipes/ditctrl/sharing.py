"""Attention of one clip's queries over another clip's keys and values, as a whole or by the object's bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from patchkit.context import AttentionCall
from patchkit.recipes.ditctrl.maps import video_of

Next = Callable[[AttentionCall], Tensor]


@dataclass(frozen=True)
class Source:
    """What a clip leaves for the next one at one op: keys, values, the mask that belongs to them, the object's bits."""

    k: Tensor
    v: Tensor
    mask: Tensor | None
    bits: Tensor | None = None


def shared(call: AttentionCall, source: Source, next: Next) -> Tensor:
    """All queries over all of the source's keys and values."""
    return next(call.replace(k=source.k, v=source.v, mask=source.mask))


def guided(call: AttentionCall, source: Source, here: Tensor, next: Next) -> Tensor:
    """Object queries see the source's object, the others what is not the object; text is seen by all and sees all.

    The official code computes two masked attentions and combines their rows. That equals one attention in which video
    query i sees video key j iff here[i] == source.bits[j], so three plain attentions over gathered tokens do: the text
    rows over all keys, and the rows of each class over the text and the keys of the same class.

    Args:
        call: the op of the clip, its own keys unused.
        source: of the clip before it, with bits.
        here: (N_v,) bool, the clip's own object.
        next: the op.
    """
    there = source.bits
    assert there is not None
    if call.text is None:
        video, text_rows = slice(0, call.q.shape[2]), None
        text_keys = here.new_zeros(0, dtype=torch.long)
    else:
        video, keys = video_of(call.text, call.q.shape[2]), source.k.shape[2]
        # the source may have another number of words (Mochi cuts padding off), on the same side
        first = call.text.start == 0
        text_rows = torch.arange(call.text.start, call.text.stop, device=here.device)
        there_text = (0, keys - len(there)) if first else (len(there), keys)
        text_keys = torch.arange(*there_text, device=here.device)
    offset = text_keys.numel() if call.text is not None and call.text.start == 0 else 0
    out = torch.empty(*call.q.shape[:3], source.v.shape[-1], dtype=call.q.dtype, device=call.q.device)
    if text_rows is not None and text_rows.numel():
        out[:, :, text_rows] = _part(call, source, text_rows, None, next)
    for wanted in (True, False):
        rows = (here == wanted).nonzero()[:, 0] + video.start
        if rows.numel():
            keys_of = (there == wanted).nonzero()[:, 0] + offset
            chosen = torch.cat([text_keys, keys_of])
            # a class that the source lacks, and no text to look at instead: plain sharing for these rows
            out[:, :, rows] = _part(call, source, rows, chosen if chosen.numel() else None, next)
    return out


def _part(call: AttentionCall, source: Source, rows: Tensor, keys: Tensor | None, next: Next) -> Tensor:
    """Some rows over some keys (None: all). What remains is no sequence that the grid speaks of."""
    k, v, mask = source.k, source.v, source.mask
    if keys is not None:
        k, v = k[:, :, keys], v[:, :, keys]
        mask = mask if mask is None or mask.shape[-1] == 1 else mask[..., keys]
    if mask is not None and mask.shape[-2] not in (1, rows.numel()):
        mask = mask[:, :, rows]
    given = call.replace(q=call.q[:, :, rows], k=k, v=v, mask=mask, grid=None, text=None)
    if call.site.kind == "self" and rows.numel() == k.shape[2] > 1:
        # as many queries as keys by chance: recipes inside must not take that for a whole sequence
        cut = (given.q[:, :, :-1], given.q[:, :, -1:])
        return torch.cat([next(given.replace(q=q)) for q in cut], 2)
    return next(given)
