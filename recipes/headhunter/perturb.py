"""Attention with some heads' maps pushed toward another map, in closed form: no map is ever built.

From "Where and How to Perturb" (HeadHunter and SoftPAG, arXiv 2506.10978). The perturbed map of a head is
(1 - u) A + u A', with A the map after softmax. Its output is the interpolation of two outputs, and for every A' here
the second one needs no N x N tensor: the value itself (A' the identity), the mean value (A' uniform), one row (A' that
of the mean query), or, with the identity among image tokens only, an attention over the text keys.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from patchkit import kernels
from patchkit.context import AttentionCall, Span
from patchkit.errors import PatchkitError

Scope = Literal["all", "image", "image_renorm"]
Target = Literal["identity", "uniform", "mean_query"]


class Form(NamedTuple):
    """Which map heads are pushed to.

    Args:
        scope: ``"all"``: the map of the whole sequence. ``"image"``: image queries keep, of the image keys, only their
            own, before the softmax; text queries are left alone. ``"image_renorm"``: the mass that image queries give
            to image keys moves to their own; text queries are left alone.
        target: what the map of the scope ``"all"`` becomes.
    """

    scope: Scope = "all"
    target: Target = "identity"

    @property
    def ignores_queries(self) -> bool:
        """Whether the pushed map can be had without the op's own output: at full strength no attention is needed."""
        return self.scope == "all"


def blend(out: Tensor, pushed: Tensor, gate: Tensor) -> Tensor:
    """(1 - u) ``out`` + u ``pushed``, both (B, H, N, D), with u = ``gate`` (B or 1, H); exact at 0 and at 1."""
    weight = gate.to(out.dtype)[:, :, None, None]
    return torch.lerp(out, pushed.to(out.dtype), weight)


def pushed(call: AttentionCall, out: Tensor | None, form: Form) -> Tensor:
    """(B, H, N, D): what every head would give with its map pushed all the way.

    Args:
        call: the attention call. Queries and keys are the same tokens, and its mask at most hides padding.
        out: the op's own output (B, H, N, D); needed unless ``form.ignores_queries``.
        form: which map.

    Raises:
        PatchkitError: it is a cross-attention, the mask is more than padding, or nobody knows where the text is.
    """
    padding = _padding(call)
    v = _per_head(call.v, call.q.shape[1])
    if form.scope == "all":
        return {"identity": _identity, "uniform": _uniform, "mean_query": _mean_query}[form.target](call, v, padding)
    assert out is not None
    image, text = _parts(call)
    if len(text) == 0:
        return v
    found = out.clone()
    found[:, :, image.start : image.stop] = _own_or_text(call, v, padding, image, text, form.scope)
    return found


def _identity(call: AttentionCall, v: Tensor, padding: Tensor | None) -> Tensor:
    return v


def _uniform(call: AttentionCall, v: Tensor, padding: Tensor | None) -> Tensor:
    """The mean value of the keys that are no padding, in fp32."""
    if padding is None:
        mean = v.float().mean(2, keepdim=True)
    else:
        weight = padding[:, None, :, None].float()
        mean = (v.float() * weight).sum(2, keepdim=True) / weight.sum(2, keepdim=True)
    return mean.to(v.dtype).expand(v.shape)


def _mean_query(call: AttentionCall, v: Tensor, padding: Tensor | None) -> Tensor:
    """Every query attends as the mean of the queries that are no padding does: one row a head."""
    q = call.q.float()
    if padding is None:
        mean = q.mean(2, keepdim=True)
    else:
        weight = padding[:, None, :, None].float()
        mean = (q * weight).sum(2, keepdim=True) / weight.sum(2, keepdim=True)
    mask = None if padding is None else padding[:, None, None, :]
    row = kernels.dense_attention(
        mean.to(call.q.dtype), call.k, call.v, mask=mask, scale=call.scale, enable_gqa=call.k.shape[1] != q.shape[1]
    )
    return row.expand(v.shape)


def _own_or_text(
    call: AttentionCall, v: Tensor, padding: Tensor | None, image: Span, text: Span, scope: Scope
) -> Tensor:
    """Image rows that give a share to their own value and the rest to what they attend to in the text.

    With L_T the log-sum-exp over the text keys: the share is sigmoid(s_ii - L_T) if the other image keys are struck
    before the softmax, and 1 - exp(L_T - L), L over all keys, if their mass moves to the own key.
    """
    q = call.q[:, :, image.start : image.stop]
    scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
    grouped = call.k.shape[1] != q.shape[1]
    hidden = None if padding is None else padding[:, None, None, :]
    over_text = None if hidden is None else hidden[..., text.start : text.stop]
    keys, values = (x[:, :, text.start : text.stop] for x in (call.k, call.v))
    told, text_lse = kernels.dense_attention(
        q, keys, values, mask=over_text, scale=scale, return_lse=True, enable_gqa=grouped
    )
    if scope == "image":
        own_key = _per_head(call.k[:, :, image.start : image.stop], q.shape[1])
        share = torch.sigmoid((q.float() * own_key.float()).sum(-1) * scale - text_lse)
    else:
        _, lse = kernels.dense_attention(
            q, call.k, call.v, mask=hidden, scale=scale, return_lse=True, enable_gqa=grouped
        )
        share = 1 - torch.exp(text_lse - lse)
    share = share[..., None]
    return (share * v[:, :, image.start : image.stop].float() + (1 - share) * told.float()).to(v.dtype)


def _per_head(x: Tensor, heads: int) -> Tensor:
    """(B, H, N, D) of key-value heads that several query heads share."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _parts(call: AttentionCall) -> tuple[Span, Span]:
    """Where the image and the text are; a self-attention of image tokens has no text."""
    tokens = call.q.shape[2]
    if call.site.kind == "self":
        return Span(0, tokens), Span(tokens, tokens)
    if call.text is None:
        raise PatchkitError(
            "nobody knows which tokens are text here",
            call.site.full_name,
            'use scope="all", or teach patchkit/adapters/table.py this model',
        )
    image = Span(call.text.stop, tokens) if call.text.start == 0 else Span(0, call.text.start)
    return image, call.text


def _padding(call: AttentionCall) -> Tensor | None:
    """(B, N) bool, True = a token, or None; refuses what is not attention of a sequence to itself."""
    if call.q.shape[2] != call.k.shape[2] or call.site.kind == "cross":
        raise PatchkitError(
            f"{call.q.shape[2]} queries and {call.k.shape[2]} keys: this is attention to something else, which has no "
            "identity map",
            call.site.full_name,
            "perturb self- and joint attention only",
        )
    if call.mask is None and not call.causal:
        return None
    padding = None if call.causal else call.key_padding()
    if padding is None:
        raise PatchkitError(
            "the attention mask says more than which tokens are padding",
            call.site.full_name,
            "perturb layers without such a mask",
        )
    return None if bool(padding.all()) else padding.expand(call.q.shape[0], -1)
