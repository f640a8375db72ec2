"""Attention taken apart by class of key: the core of methods that move or weigh attention between kinds of tokens.

Each key has a class (text, image, sink ...), given as one byte. One pass tells how much of each row's attention goes to
each class, and the output inside any union of classes. From these parts an edit of the attention map is a few lines:

    parts = class_attention(q, k, v, classes, 4)
    parts.share(2, 3)                  # attention to classes 2 and 3
    parts.output(3)                    # what the row would read if it saw class 3 only

- *After the softmax*, mass moves between classes: ``out + moved * (parts.output(target) - parts.output(source))``
  (VAR; :mod:`patchkit.kernels.redistribute`).
- *Before the softmax*, ``boost`` raises the logits of a class by a share of their size, s + boost * |s|; then
  ``parts.output(*range(count))`` is the edited attention (the form of PAI, arXiv 2407.21771).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import gpu
from ..errors import type_error, value_error
from .blocked import class_attention_blocked
from .parts import Parts
from .reference import HIDDEN

__all__ = ["HIDDEN", "Parts", "class_attention"]

WHERE = "class_attention"


def class_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    classes: Tensor,
    count: int,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    boost: Sequence[float] | None = None,
) -> Parts:
    """Attention over classes of keys. Logits, sums and outputs are fp32.

    Args:
        q: (B, H, q_len, D). Plain torch keeps (B, H, q_len, kv_len) fp32: give it some 128 rows at a time.
        k: (B, Hkv, kv_len, D); query head h uses KV head h // (H / Hkv).
        v: as ``k``.
        classes: (B or 1, kv_len) uint8: below ``count``, or :data:`HIDDEN` for keys that nobody sees.
        count: number of classes, at most 8.
        mask: bool (True = sees) or additive, broadcastable to (B, H, q_len, kv_len). A single query without one takes
            the Triton kernel on a GPU: say by :data:`HIDDEN` what it does not see.
        scale: logit scale, default 1 / sqrt(D).
        softcap: c: logits become c * tanh(s / c), before ``boost`` and ``mask``.
        boost: one number a class: logits become s + boost * |s|.

    Raises:
        KernelValueError: shapes or numbers that do not fit.
        KernelTypeError: dtypes that do not fit.
    """
    check(q, k, v, classes, count, boost)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if mask is None and boost is None and triton_obstacle(q, k, v, count) is None:
        from .triton.launch import class_attention_triton

        return class_attention_triton(q, k, v, classes, count, scale, softcap)
    with torch.autocast(q.device.type, enabled=False):
        return class_attention_blocked(q, k, v, classes, count, mask, scale, softcap, boost)


def triton_obstacle(q: Tensor, k: Tensor, v: Tensor, count: int) -> str | None:
    """Why plain torch takes a call without a mask and not the Triton kernels; None when they do."""
    found = gpu.obstacle(q.device)
    if found is None and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        found = "the Triton kernels have no backward"
    if found is None:
        from .triton.launch import unsupported

        found = unsupported(q, k, v, count)
    return found


def check(q: Tensor, k: Tensor, v: Tensor, classes: Tensor, count: int, boost: Sequence[float] | None = None) -> None:
    """Refuse what :func:`class_attention` and what is built on it cannot take."""
    if q.dim() != 4 or k.dim() != 4 or v.shape != k.shape or q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1]:
        raise value_error(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}", WHERE, "Expected (B, H, N, D), k like v."
        )
    if q.shape[1] % k.shape[1]:
        raise value_error(f"{q.shape[1]} heads over {k.shape[1]} KV heads", WHERE, "H must be a multiple of Hkv.")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise type_error(f"q {q.dtype}, k {k.dtype}, v {v.dtype}", WHERE, "Pass one floating dtype.")
    if classes.dtype != torch.uint8:
        raise type_error(f"classes are {classes.dtype}", WHERE, "Pass uint8.")
    if classes.dim() != 2 or classes.shape[0] not in (1, q.shape[0]) or classes.shape[1] != k.shape[2]:
        raise value_error(f"classes {tuple(classes.shape)} for k {tuple(k.shape)}", WHERE, "Expected (B or 1, kv_len).")
    if not 1 <= count <= 8:
        raise value_error(f"{count} classes", WHERE, "Use 1 to 8.")
    if boost is not None and len(boost) != count:
        raise value_error(f"{len(boost)} boosts for {count} classes", WHERE, "Pass one a class.")
