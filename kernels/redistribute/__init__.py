"""Redistribution: move a share of the attention that goes to sinks onto the image tokens that are none.

VAR, "See What You Are Told: Visual Attention Sink in Large Multimodal Models", arXiv 2503.03321. With a_S and a_N the
attention of a row to the sinks S and to the visual tokens N that are no sinks, and o_S and o_N its output inside them,
the edited row reads

    out' = out + recycle * a_S * (o_N - o_S)

where its head looks at the image: a_V = a_N + (attention to visual sinks) >= least, and a_N >= rho * a_V. Elsewhere
out' is out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..classes import HIDDEN, check, class_attention, triton_obstacle
from ..errors import value_error
from .blocked import redistribute_decode_blocked
from .reference import CLASSES, OTHER, TARGET, TEXT_SINK, VISUAL_SINK

__all__ = [
    "OTHER",
    "TARGET",
    "TEXT_SINK",
    "VISUAL_SINK",
    "Moved",
    "decode_obstacle",
    "redistribute",
    "redistribute_decode",
]

# "At least" holds up to the rounding of fp32 sums: a head exactly on the border is edited.
ROUNDING = 1e-6


class Moved(NamedTuple):
    """What redistribution did.

    Attributes:
        out: (B, H, q_len, D) in the dtype of the dense output; rows that were not edited have its bits.
        selected: (B, H, q_len) bool, rows that were edited.
        mass: (B, H, q_len) fp32, attention that was moved; 0 elsewhere.
    """

    out: Tensor
    selected: Tensor
    mass: Tensor


def redistribute(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    classes: Tensor,
    *,
    recycle: float,
    rho: float,
    least: float,
    allowed: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Moved:
    """Edit a dense output. fp32 inside, cast once at the end; differentiable.

    Args:
        out: (B, H, q_len, D), dense attention of these rows, from whatever computed it.
        q: (B, H, q_len, D), some 128 rows at most: (B, H, q_len, kv_len) fp32 is kept.
        k: (B, Hkv, kv_len, D).
        v: as ``k``.
        classes: (B or 1, kv_len) uint8: ``OTHER``, ``TEXT_SINK``, ``VISUAL_SINK``, ``TARGET``, or ``HIDDEN``.
        recycle: share of the sinks' attention that is moved, in [0, 1].
        rho: least share of the visual attention outside the sinks; above 1 nothing is edited.
        least: least visual attention.
        allowed: (B or 1, q_len) bool, rows that may be edited; None = all.
        mask: bool (True = sees) or additive, broadcastable to (B, H, q_len, kv_len).
        scale: logit scale, default 1 / sqrt(D).
        softcap: c: logits become c * tanh(s / c).

    Raises:
        KernelValueError: shapes that do not fit.
        KernelTypeError: dtypes that do not fit.
    """
    parts = class_attention(q, k, v, classes, CLASSES, mask=mask, scale=scale, softcap=softcap)
    targets, visual = parts.share(TARGET), parts.share(VISUAL_SINK, TARGET)
    selected = (visual >= least * (1 - ROUNDING)) & (targets >= rho * (1 - ROUNDING) * visual) & (targets > 0)
    if rho > 1 or recycle == 0:
        selected = torch.zeros_like(selected)
    if allowed is not None:
        selected = selected & allowed[:, None]
    moved = torch.where(selected, recycle * parts.share(TEXT_SINK, VISUAL_SINK), 0.0)
    if selected.device.type == "cpu" and not bool(selected.any()):  # a GPU would have to be waited for
        return Moved(out, selected, moved)
    # moved * (o_N - o_S), in one pass over the values
    tiny = torch.finfo(torch.float32).tiny
    gained = moved / parts.sum(TARGET).clamp_min(tiny)
    lost = -moved / parts.sum(TEXT_SINK, VISUAL_SINK).clamp_min(tiny)
    edited = (out.float() + parts.mixed(torch.stack((torch.zeros_like(lost), lost, lost, gained), -1))).to(out.dtype)
    return Moved(torch.where(selected[..., None], edited, out), selected, moved)


def decode_obstacle(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> str | None:
    """Why :func:`redistribute_decode` cannot take a call, or would lose by it; None if it is worth it."""
    if mask is not None and (mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1:3] != (1, 1)):
        return "a mask that does not only say which keys are hidden"
    if q.dim() != 4 or q.shape[2] != 1:
        return "several queries"
    found = triton_obstacle(q, k, v, CLASSES)
    # plain torch does it as fast as torch's own attention on a CPU in fp32 (its 16-bit products are slow there)
    return None if found is not None and q.device.type == "cpu" and q.dtype == torch.float32 else found


def redistribute_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    classes: Tensor,
    *,
    recycle: float,
    rho: float,
    least: float,
    allowed: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Moved:
    """Attention of one query a head with redistribution, in one pass over keys and values.

    Arguments as those of :func:`redistribute`, with q (B, H, 1, D), mask (B or 1, 1, 1, kv_len) bool, allowed (B or 1,
    1) bool. It computes the dense output itself: rows that are not edited agree with the dense kernel's to rounding.

    Raises:
        KernelValueError: shapes that do not fit, or :func:`decode_obstacle` says why.
        KernelTypeError: dtypes that do not fit.
    """
    check(q, k, v, classes, CLASSES)
    obstacle = decode_obstacle(q, k, v, mask)
    if obstacle is not None:
        raise value_error(obstacle, "redistribute_decode", "Use redistribute with a dense output.")
    if mask is not None:
        classes = torch.where(mask[:, 0, 0], classes, HIDDEN)
    off = rho > 1 or recycle == 0
    inside = q.new_ones(1, dtype=torch.int8) if allowed is None else allowed[:, 0].to(torch.int8)
    inside = (torch.zeros_like(inside) if off else inside).expand(q.shape[0]).contiguous()
    low, share = least * (1 - ROUNDING), rho * (1 - ROUNDING)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if triton_obstacle(q, k, v, CLASSES) is None:
        from .triton import redistribute_triton

        return Moved(*redistribute_triton(q, k, v, classes, inside, recycle, share, low, scale, softcap))
    with torch.autocast(q.device.type, enabled=False):
        return Moved(*redistribute_decode_blocked(q, k, v, classes, inside, recycle, share, low, scale, softcap))
