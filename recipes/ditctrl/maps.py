"""Where an object is: the attention between its words and the video, streamed, averaged over layers, cut to bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from patchkit import kernels
from patchkit.context import AttentionCall, Grid, Span

Next = Callable[[AttentionCall], Tensor]
Map = Literal["v2t", "avg"]


def video_of(text: Span, keys: int) -> slice:
    """The video tokens of a joint sequence: text stands at one end of it."""
    return slice(text.stop, keys) if text.start == 0 else slice(0, text.start)


def own_attention(call: AttentionCall, next: Next, sample: int) -> tuple[Tensor, Tensor]:
    """What the op gives, and the LSE (H, Nq) of one sample's rows; see :func:`own_attention_of_all`."""
    found = _in_one_pass(call, next)
    return (found[0], found[1][sample]) if found is not None else (next(call), lse_of(call, sample))


def own_attention_of_all(call: AttentionCall, next: Next) -> tuple[Tensor, Tensor]:
    """What the op gives, and the LSE (B, H, Nq) of all its rows.

    Where the model's own op takes the kernel that our dense pass takes (one head tells), both come of one pass, and the
    output is the model's to the bit. Otherwise a second pass gives the LSE.
    """
    return _in_one_pass(call, next) or (next(call), _lse(call.q, call.k, call.v, call.mask, call.scale))


def _in_one_pass(call: AttentionCall, next: Next) -> tuple[Tensor, Tensor] | None:
    if call.mask is not None or next is not call.site.terminal:
        return None
    out, lse = kernels.dense_attention(call.q, call.k, call.v, scale=call.scale, return_lse=True)
    one = next(call.replace(q=call.q[:1, :1], k=call.k[:1, :1], v=call.v[:1, :1]))
    return (out, lse) if torch.equal(one, out[:1, :1]) else None


def lse_of(call: AttentionCall, sample: int) -> Tensor:
    """(H, Nq) LSE of one sample's rows over all keys, by a dense pass of its own."""
    rows = slice(sample, sample + 1)
    mask = call.mask if call.mask is None or call.mask.shape[0] == 1 else call.mask[rows]
    return _lse(call.q[rows], call.k[rows], call.v[rows], mask, call.scale)[0]


def _lse(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    return kernels.dense_attention(q, k, v, mask=mask, scale=scale, return_lse=True)[1]


def columns(q: Tensor, k: Tensor, lse: Tensor, scale: float | None) -> Tensor:
    """Softmax probabilities of a few columns: exp(q k' / sqrt(D) - LSE), fp32, no N x N tensor.

    Args:
        q: (..., R, D), the rows.
        k: (..., C, D), the keys whose columns are wanted.
        lse: (..., R), log of the rows' sums over *all* keys.
        scale: softmax scale; None means D ** -0.5.

    Returns:
        (..., R, C).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = (q.float() @ k.float().transpose(-1, -2)) * scale
    return (logits - lse[..., None]).exp()


def word_map(call: AttentionCall, lse: Tensor, sample: int, tokens: tuple[int, ...], kind: Map) -> Tensor:
    """(N_v,) attention between the video tokens and a word's tokens, mean over heads, summed over the tokens.

    ``"v2t"``: what video queries give to the word's keys; ``"avg"``: the mean of that and of what the word's queries
    give to the video keys. In a cross-attention there is the former only.
    """
    q, k, scale = call.q[sample], call.k[sample], call.scale
    start = call.text.start if call.text is not None else 0
    words = torch.tensor([start + t for t in tokens], device=q.device)
    if call.site.kind == "cross":
        return columns(q, k[:, words], lse, scale).sum(-1).mean(0)
    assert call.text is not None
    video = video_of(call.text, q.shape[1])
    found = columns(q[:, video], k[:, words], lse[:, video], scale).sum(-1).mean(0)
    if kind == "avg":
        back = columns(q[:, words], k[:, video], lse[:, words], scale).sum(1).mean(0)
        found = (found + back) / 2
    return found


class RunningMap:
    """The mean of the maps of the layers so far, within one forward."""

    def __init__(self, total: Tensor | None = None, layers: int = 0) -> None:
        self.total, self.layers = total, layers

    def add(self, found: Tensor) -> None:
        """Count a layer's map in. The sum is a new tensor: others may have kept the one before."""
        self.total = found if self.total is None else self.total + found
        self.layers += 1

    def copy(self) -> RunningMap:
        """As it is now."""
        return RunningMap(self.total, self.layers)

    def bits(self, grid: Grid, threshold: float) -> Tensor:
        """(N_v,) bool: where the mean, stretched to [0, 1] in each frame, reaches the threshold."""
        assert self.total is not None
        return bits(self.total / self.layers, grid, threshold)


def bits(found: Tensor, grid: Grid, threshold: float) -> Tensor:
    """(N_v,) bool of a map (N_v,), frame by frame: (x - min) / (max - min + 1e-6) >= threshold."""
    frames = found.view(grid.frames, -1)
    low, high = frames.amin(1, keepdim=True), frames.amax(1, keepdim=True)
    return ((frames - low) / (high - low + 1e-6) >= threshold).flatten()
