"""Which tokens are sinks in a layer, and what each key is to the queries of that layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from patchkit.context import AttentionCall
from patchkit.kernels.redistribute import OTHER, TARGET, TEXT_SINK, VISUAL_SINK

EPSILON = 1e-6


def outlier(hidden: Tensor, dims: tuple[int, ...]) -> Tensor:
    """phi of hidden states (B, N, d): the largest of the channels ``dims``, in units of the RMS over all; (B, N) fp32.

    Of the residual stream itself, without the gain of a norm. At most sqrt(d).
    """
    x = hidden.float()
    if not dims:
        return x.new_zeros(x.shape[:-1])
    return x[..., list(dims)].abs().amax(-1) * torch.rsqrt(x.square().mean(-1) + EPSILON)


@dataclass
class Marks:
    """The sinks of one layer.

    Attributes:
        sink: (B, length) bool; tokens behind it were generated and are none.
    """

    sink: Tensor

    def extended(self, new: Tensor, past: int) -> Marks:
        """With the tokens from ``past`` on; a cache may have been cut back before."""
        known = F.pad(self.sink, (0, past - self.sink.shape[1])) if self.sink.shape[1] < past else self.sink[:, :past]
        return Marks(torch.cat((known.to(new.device), new), 1))


def classified(
    known: Marks | None, hidden: Tensor, past: int, dims: tuple[int, ...], tau: float, track: bool
) -> Marks | None:
    """The sinks of a layer after a call whose hidden states (B, N, d) enter it, following ``past`` tokens.

    A call with several tokens is a prompt, or a further part of one: its tokens are classified. A single token was
    generated: it is no sink, unless ``track``. None if the beginning went by unseen.
    """
    if past and (known is None or known.sink.shape[0] != hidden.shape[0]):
        return None
    if past and hidden.shape[1] == 1 and not track:
        assert known is not None
        return known if known.sink.shape[1] <= past else Marks(known.sink[:, :past])
    new = outlier(hidden, dims) >= tau
    return known.extended(new, past) if past and known is not None else Marks(new)


@dataclass
class KeyMap:
    """What each key is, for one call at one layer.

    Attributes:
        classes: (B, Nk) uint8, as :func:`patchkit.kernels.redistribute` wants them.
        visual: (B, Nk) bool, which keys are visual.
        edits: (B,) bool, samples that may be edited here; None if none may.
        count: how many samples that are.
        following: number of the key that a next single token would be.
    """

    classes: Tensor
    visual: Tensor
    edits: Tensor | None
    count: int
    following: int

    def goes_on(self, call: AttentionCall) -> bool:
        """Whether a call only adds one generated token to what was mapped."""
        longer = call.k.shape[2] - self.classes.shape[1]
        return call.q.shape[2] == 1 and call.first == self.following and longer in (0, 1)

    def with_one_more(self, keys: int) -> KeyMap:
        """For the next generated token, which is neither visual nor a sink."""
        pad = (0, keys - self.classes.shape[1])
        classes = F.pad(self.classes, pad, value=OTHER) if pad[1] else self.classes
        return KeyMap(classes, self.visual, self.edits, self.count, self.following + 1)


def key_map(call: AttentionCall, marks: Marks, need_visual_sink: bool) -> KeyMap:
    """Sort the keys of a call. ``call.visual``, ``real`` and ``first`` must be known."""
    assert call.visual is not None
    assert call.real is not None
    assert call.first is not None
    keys, queries = call.k.shape[2], call.q.shape[2]
    sink = marks.sink.to(call.k.device)[:, call.dropped : call.dropped + keys]
    sink = F.pad(sink, (0, keys - sink.shape[1])) & call.real
    visual = call.visual & call.real
    classes = torch.where(visual, torch.where(sink, VISUAL_SINK, TARGET), torch.where(sink, TEXT_SINK, OTHER))
    edits = (visual & sink).any(1) if need_visual_sink else visual.any(1)
    count = int(edits.sum())
    return KeyMap(classes.to(torch.uint8), visual, edits if count else None, count, call.first + queries)
