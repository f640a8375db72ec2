"""The backward of ``block_sparse_attention``: an operator of its own, and its registration with autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dense.library import cpu_flash_backward
from ..errors import GradientError
from ..layout import BlockLayout
from ..layout.recall import recall
from .blocked.backward import block_sparse_backward_blocked
from .plan import keeps_everything, triton_obstacle

Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


@torch.library.custom_op("patchkit::block_sparse_attention_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
    kv_idx: Tensor,
    kv_num: Tensor,
    part_idx: Tensor | None,
    part_num: Tensor | None,
    part_bits: Tensor | None,
    q_seg: Tensor | None,
    kv_seg: Tensor | None,
    kv_lens: Tensor | None,
    block_q: int,
    block_k: int,
    causal_offset: int | None,
    scale: float,
    need_q: bool,
    need_k: bool,
    need_v: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    lists = (kv_idx, kv_num, part_idx, part_num, part_bits, causal_offset, q_seg, kv_seg, kv_lens)
    layout = recall(BlockLayout(block_q, block_k, q.shape[2], k.shape[2], *lists))
    # Gradients of sums and means come expanded, with stride 0 everywhere.
    dout = dout if dout is None or dout.stride(-1) == 1 else dout.contiguous()
    with torch.autocast(q.device.type, enabled=False):
        found = block_sparse_backward(q, k, v, out, lse, dout, dlse, layout, scale, (need_q, need_k, need_v))
    dq, dk, dv = (q.new_empty(0) if x is None else x.contiguous() for x in found)
    return dq, dk, dv


@_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape if need else (0,)) for x, need in zip((q, k, v), rest[-3:], strict=True))
    return dq, dk, dv


def block_sparse_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
    layout: BlockLayout,
    scale: float,
    needs: tuple[bool, bool, bool],
) -> Grads:
    """Gradients by the implementation for these tensors; see ``backward_reference`` for the arguments."""
    if dout is not None and dlse is None and (n := _dense_keys(layout, q.device)) is not None:
        dq, *found = cpu_flash_backward(dout, q, k[:, :, :n], v[:, :, :n], out, lse, None, scale)
        dk, dv = (torch.nn.functional.pad(x, (0, 0, 0, layout.kv_len - n)) for x in found)
        return tuple(x if need else None for x, need in zip((dq, dk, dv), needs, strict=True))  # type: ignore[return-value]
    if triton_obstacle(layout, q.shape[-1], q.dtype, q.device) is None:
        from .triton.backward_launch import block_sparse_backward_triton

        return block_sparse_backward_triton(q, k, v, out, lse, dout, dlse, layout, scale, needs)
    return block_sparse_backward_blocked(q, k, v, out, lse, dout, dlse, layout, scale, needs)


def _dense_keys(layout: BlockLayout, device: torch.device) -> int | None:
    """How many keys all queries of all samples keep, on a CPU and if they keep no others; else None."""
    if device.type != "cpu" or not keeps_everything(layout):
        return None
    if layout.kv_lens is None:
        return layout.kv_len
    fewest, most = (int(n) for n in layout.kv_lens.aminmax())
    return most if fewest == most else None


def register(op: Any) -> None:
    """Make ``op``, the forward operator, differentiable in q, k and v."""
    op.register_autograd(_gradients, setup_context=_remember)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], *output)
    # The lists need no version check (layouts are immutable). As plain attributes they stay the same objects under
    # activation checkpointing too, so that what their layout has derived from them is found again.
    ctx.lists, ctx.numbers = inputs[3:11], inputs[11:15]


def _gradients(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:3]
    nothing = (None,) * len(ctx.needs_input_grad)
    if dout is None and dlse is None:
        return nothing
    found = _backward(*ctx.saved_tensors, dout, dlse, *ctx.lists, *ctx.numbers, *needs)
    return (*(x if need else None for x, need in zip(found, needs, strict=True)), *nothing[3:])


def _refuse_second(ctx: Any, *grads: Tensor | None) -> None:
    raise GradientError(
        "block_sparse_attention: its gradients have no gradients of their own. Second derivatives (gradient "
        "penalties, Hessian products) need attention in plain torch, such as F.scaled_dot_product_attention with a "
        "mask and the math backend."
    )


_backward.register_autograd(_refuse_second)
