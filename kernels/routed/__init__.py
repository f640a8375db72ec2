"""Attention of routed heads (Mixture-of-Head attention, MoH, arXiv 2410.11842): a head serves only some query rows."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import type_error, value_error
from .blocked import routed_blocked
from .dense import dense_heads
from .gradients import register
from .plan import routed_path, triton_obstacle, why_dense
from .reference import everywhere, routed_reference
from .sight import sights_of

__all__ = ["routed_attention", "routed_path", "why_dense"]

WHERE = "routed_attention"
Name = Literal["reference", "dense", "blocked", "triton"]
NAMES = ("reference", "dense", "blocked", "triton")


@torch.library.custom_op("patchkit::routed_attention", mutates_args=())
def _routed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    active: Tensor,
    gates: Tensor | None,
    mask: Tensor | None,
    shared: int,
    scale: float,
    causal: bool,
    path: str,
) -> Tensor:
    if not q.numel() or not k.shape[2]:
        return torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    name = path or routed_path(q, k, active, shared).name
    # Precision is this operator's business: under the caller's autocast its fp32 matmuls would become bf16.
    with torch.autocast(q.device.type, enabled=False):
        if name == "triton":
            from .triton.launch import routed_triton

            return routed_triton(q, k, v, active, shared, gates, scale, causal, mask)
        if name == "blocked":
            return routed_blocked(q, k, v, active, shared, gates, scale, causal, mask)
        if name == "reference":
            found = routed_reference(q, k, v, active, shared=shared, gates=gates, scale=scale, causal=causal, mask=mask)
            return found.to(q.dtype)
        return _dense(q, k, v, active, shared, gates, scale, causal, mask)


@_routed.register_fake
def _(q: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(q.shape)


register(_routed)


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    active: Tensor,
    shared: int,
    gates: Tensor | None,
    scale: float,
    causal: bool,
    mask: Tensor | None,
) -> Tensor:
    """All heads on all rows, times their gates."""
    sights = None
    if mask is not None or (causal and q.shape[2] > 1):
        on_cpu = q.device.type == "cpu"
        sights = sights_of(q.shape[0], q.shape[2], k.shape[2], causal, mask, q.device) if on_cpu else None
    out = dense_heads(q, k, v, scale, causal, mask, sights)
    if gates is not None:
        out = out * gates.unsqueeze(-1)
    return out.to(q.dtype).masked_fill(~everywhere(active, shared).unsqueeze(-1), 0.0).contiguous()


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    active: Tensor,
    *,
    shared: int = 0,
    gates: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
    path: Name | None = None,
) -> Tensor:
    """Attention of which each head computes only the rows that are routed to it (MoH, arXiv 2410.11842).

    Keys and values serve every row, whatever their own tokens were routed to. With a share a of all (token, head) pairs
    active the ideal time is a of dense attention's. One query (decoding) leaves unread the key-value heads that no
    active head needs. Where nothing can be gained (short sequences, one query whose heads share their keys) dense
    attention times the gates is computed instead: :func:`patchkit.kernels.routed_path` says which and why.

    Args:
        q: (B, H, N, D), any strides with contiguous D.
        k: (B, G, M, D); query head h uses KV head h // (H / G).
        v: as ``k``.
        active: (B, H, N) bool: which rows each head serves. The first ``shared`` heads serve all, whatever it says.
        shared: heads 0 to ``shared`` - 1 serve every row.
        gates: (B, H, N) floating, factors of the outputs; None = 1. Not read where not active.
        scale: logit scale, default 1 / sqrt(D).
        causal: row i sees keys up to M - N + i, so that the last row sees the last key.
        mask: bool, broadcastable to (B, 1, N, M), True = may be seen; on top of ``causal``. Padding, given by key
            (B, 1, 1, M) or with the causal part in it, costs next to nothing; hidden keys are not read.
        path: "reference" (formula, fp32), "dense" (all heads times gates), "blocked" (active rows gathered, plain
            torch) or "triton"; None = what is fastest.

    Returns:
        (B, H, N, D) in q's dtype, contiguous. Exactly 0 where not active, and in rows that see no key. It has gradients
        in q, k, v (of active rows) and the gates (<dOut, O>; 0 where not active): the gradient of a hard gate. A
        straight-through estimator needs the outputs of all heads; it is dense attention times the gates. There are no
        second derivatives: asking for them raises GradientError.

    Raises:
        KernelValueError: shapes, devices or strides that do not fit, or a path that cannot take the call.
        KernelTypeError: dtypes that do not fit.
    """
    _check(q, k, v, active, shared, gates, mask)
    if path is not None and path not in NAMES:
        raise value_error(f"path is {path!r}", WHERE, f"Use one of {', '.join(NAMES)}, or None.")
    if path == "triton" and (missing := triton_obstacle(q, k)) is not None:
        raise value_error(f"no Triton kernel for this call: {missing}", WHERE, "Use path=None.")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _routed(q, k, v, active, gates, mask, shared, scale, causal, path or "")


def _check(
    q: Tensor, k: Tensor, v: Tensor, active: Tensor, shared: int, gates: Tensor | None, mask: Tensor | None
) -> None:
    """Host-side checks that read no tensor values."""
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1]:
        raise value_error(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}",
            WHERE,
            "Expected (B, H, N, D) and (B, G, M, D), v like k.",
        )
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise value_error(f"{q.shape[1]} heads over {k.shape[1]} KV heads", WHERE, "H must be a multiple of G.")
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        raise type_error(f"q {q.dtype}, k {k.dtype}, v {v.dtype}", WHERE, "Cast them to one floating dtype.")
    for name, x, kind in (("active", active, "bool"), ("gates", gates, "floating")):
        if x is not None and x.shape != q.shape[:3]:
            raise value_error(f"{name} {tuple(x.shape)}", WHERE, f"Expected (B, H, N), here {tuple(q.shape[:3])}.")
        if x is not None and not (x.dtype == torch.bool if kind == "bool" else x.is_floating_point()):
            raise type_error(f"{name} is {x.dtype}", WHERE, f"Pass a {kind} tensor.")
    if not 0 <= shared <= q.shape[1]:
        raise value_error(f"{shared} shared heads of {q.shape[1]}", WHERE, "Use 0 to H.")
    if mask is not None:
        _check_mask(q, k, mask)
    found = {x.device for x in (q, k, v, active, gates, mask) if x is not None}
    if len(found) > 1:
        raise value_error(f"tensors on {', '.join(sorted(map(str, found)))}", WHERE, "Move them to one device.")
    if any(x.stride(-1) != 1 and x.shape[-1] > 1 for x in (q, k, v)):
        raise value_error("the last dimension is strided", WHERE, "Call .contiguous() on that tensor.")


def _check_mask(q: Tensor, k: Tensor, mask: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise type_error(f"mask is {mask.dtype}", WHERE, "Pass a bool mask: True where a key may be seen.")
    wanted = (q.shape[0], 1, q.shape[2], k.shape[2])
    if mask.dim() > 4 or any(a not in (1, b) for a, b in zip(reversed(mask.shape), reversed(wanted), strict=False)):
        raise value_error(f"mask {tuple(mask.shape)}", WHERE, f"It must broadcast to (B, 1, N, M), here {wanted}.")


routed_attention.plan = routed_path  # type: ignore[attr-defined]  # the query next to the call it describes
