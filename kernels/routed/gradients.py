"""The backward of ``routed_attention``: active rows only, their weights computed again, an operator of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import GradientError
from .reference import everywhere
from .rows import Rows, gather, rows_of
from .sight import Sight, sights_of

# Rows whose weights are kept at a time.
ROWS = 256


@torch.library.custom_op("patchkit::routed_attention_backward", mutates_args=())
def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    active: Tensor,
    gates: Tensor | None,
    mask: Tensor | None,
    shared: int,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        return routed_backward(dout, q, k, v, active, gates, mask, shared, scale, causal)


@_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, active: Tensor, gates: Tensor | None, *rest: Any) -> Any:
    dgates = q.new_empty(0) if gates is None else gates.new_empty(gates.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dgates


def routed_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    active: Tensor,
    gates: Tensor | None,
    mask: Tensor | None,
    shared: int,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients in q, k, v and the gates (empty without gates); 0 for rows that are not active."""
    exact = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (torch.zeros(x.shape, dtype=exact, device=x.device) for x in (q, k, v))
    dgates = torch.zeros(q.shape[:3] if gates is not None else (0,), dtype=exact, device=q.device)
    sights = sights_of(q.shape[0], q.shape[2], k.shape[2], causal, mask, q.device)
    active = everywhere(active, shared)
    for b, sight in enumerate(sights):
        for rows in rows_of(active[b], k.shape[1], sight):
            j = rows.kv_head
            found = _kv_head(dout[b], q[b], k[b, j], v[b, j], gates if gates is None else gates[b], scale, sight, rows)
            at = rows.heads, rows.tokens
            dq[b][at] = found[0]
            dk[b, j, sight.keys], dv[b, j, sight.keys] = found[1:3]
            if gates is not None:
                dgates[b][at] = found[3]
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dgates.to(dgates.dtype if gates is None else gates.dtype)


def _kv_head(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, gates: Tensor | None, scale: float, sight: Sight, rows: Rows
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq (R, D) of the rows, dk and dv (seen keys, D), and the gradient (R,) of a gate of each row."""
    exact = torch.promote_types(q.dtype, torch.float32)
    k, v = sight.of(k).to(exact), sight.of(v).to(exact)
    dk, dv, dqs, dgs = torch.zeros_like(k), torch.zeros_like(v), [], []
    for start, stop, _, last in rows.pieces(ROWS):
        some = slice(start, stop)
        where = rows.heads[some], rows.tokens[some]
        rq, g = gather(q, *where).to(exact), gather(dout, *where).to(exact)
        seen = torch.arange(last, device=q.device) < rows.ends[some, None]
        if sight.pairs is not None:
            seen = sight.pairs[:, :last].index_select(0, rows.tokens[some])
        p = (rq @ k[:last].t()).mul_(scale).masked_fill_(~seen, float("-inf")).softmax(-1)
        dgs.append(((p @ v[:last]) * g).sum(-1))
        delta = dgs[-1]
        if gates is not None:
            gate = gather(gates, *where).to(exact)
            g, delta = g * gate.unsqueeze(-1), delta * gate
        dv[:last].addmm_(p.t(), g)
        ds = (g @ v[:last].t()).sub_(delta.unsqueeze(-1)).mul_(p).mul_(scale)
        dqs.append(ds @ k[:last])
        dk[:last].addmm_(ds.t(), rq)
    return torch.cat(dqs), dk, dv, torch.cat(dgs)


def register(op: Any) -> None:
    """Make ``op``, the forward operator, differentiable in q, k, v and the gates."""
    op.register_autograd(_gradients, setup_context=_remember)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, active, gates, mask, shared, scale, causal, _ = inputs
    ctx.save_for_backward(q, k, v, active, gates, mask)
    ctx.numbers = shared, scale, causal


def _gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dv, dgates = _backward(dout, *ctx.saved_tensors, *ctx.numbers)
    return dq, dk, dv, None, dgates if ctx.saved_tensors[4] is not None else None, None, None, None, None, None


def _refuse_second(ctx: Any, *grads: Tensor | None) -> None:
    raise GradientError(
        "routed_attention: its gradients have no gradients of their own. Second derivatives need attention in plain "
        "torch, such as F.scaled_dot_product_attention with the math backend, times the gates."
    )


_backward.register_autograd(_refuse_second)
