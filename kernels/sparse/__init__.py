"""Block-sparse attention: the public operator and its registration with torch."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..errors import layout_error, type_error, value_error
from ..layout import BlockLayout
from ..layout.recall import recall, remember
from .blocked.forward import block_sparse_blocked
from .complete import complete_attention
from .gradients import register
from .plan import Path, choose_path, keeps_everything, triton_obstacle

__all__ = ["Path", "block_sparse_attention", "choose_path"]

WHERE = "block_sparse_attention"


@torch.library.custom_op("patchkit::block_sparse_attention", mutates_args=())
def _block_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
    num_splits: int,
) -> tuple[Tensor, Tensor]:
    made = BlockLayout(
        block_q,
        block_k,
        q.shape[2],
        k.shape[2],
        kv_idx,
        kv_num,
        part_idx,
        part_num,
        part_bits,
        causal_offset,
        q_seg,
        kv_seg,
        kv_lens,
    )
    layout = recall(made)
    # Precision is this operator's business: under the caller's autocast its fp32 matmuls would become bf16.
    with torch.autocast(q.device.type, enabled=False):
        if keeps_everything(layout):
            out, lse = complete_attention(q, k, v, layout, scale)
        elif triton_obstacle(layout, q.shape[-1], q.dtype, q.device) is None:
            from .triton.launch import block_sparse_triton

            out, lse = block_sparse_triton(q, k, v, layout, scale, num_splits)
        else:
            out, lse = block_sparse_blocked(q, k, v, layout, scale, num_splits)
    return out.contiguous(), lse.contiguous()


@_block_sparse.register_fake
def _(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


register(_block_sparse)


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    layout_fmt: Literal["BHND", "BNHD"] = ...,
    num_splits: int = ...,
    validate: bool = ...,
) -> Tensor: ...


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    scale: float | None = ...,
    return_lse: Literal[True],
    layout_fmt: Literal["BHND", "BNHD"] = ...,
    num_splits: int = ...,
    validate: bool = ...,
) -> tuple[Tensor, Tensor]: ...


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    layout_fmt: Literal["BHND", "BNHD"] = "BHND",
    num_splits: int = 1,
    validate: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over the kept blocks only (AdaSpa, arXiv 2502.21079, eq. 12); dropped keys are never read.

    Args:
        q: (B, H, q_len, D), or (B, q_len, H, D) with ``layout_fmt="BNHD"``; any strides with contiguous D.
        k: the same with Hkv heads and kv_len tokens; query head h uses KV head h // (H / Hkv).
        v: as ``k``.
        layout: kept blocks; B' and H' are 1 or the real sizes.
        scale: logit scale, default 1 / sqrt(D).
        return_lse: also return the natural-log LSE over the kept keys, (B, H, q_len) fp32.
        layout_fmt: order of the dimensions of q, k, v and the output.
        num_splits: cut each row's keys into at least this many parts that are computed apart and merged.
        validate: False skips all checks of shapes and of the layout.

    Returns:
        Output in q's dtype and format [, lse]. A row that keeps nothing is 0, with LSE -inf. Both have gradients in q,
        k and v (the layout is a constant): keys that no query keeps and rows that keep nothing get 0. There are no
        second derivatives: asking for them raises GradientError.

    Raises:
        KernelValueError: shapes, devices or strides that do not fit (LayoutError when the layout is at fault).
        KernelTypeError: q, k, v of different or non-floating dtypes.
    """
    if layout_fmt == "BNHD":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    elif layout_fmt != "BHND":
        raise value_error(f"layout_fmt is {layout_fmt!r}", WHERE, "Use 'BHND' or 'BNHD'.")
    if validate:
        check_inputs(q, k, v, layout, num_splits)
        if not torch.compiler.is_compiling():
            # Reads the lists once per layout; a traced call relies on the constructors having done so.
            layout.validate()
    elif not torch.compiler.is_compiling():
        remember(layout)  # what is derived from it must outlive this call, checked or not
    out, lse = _block_sparse(
        q,
        k,
        v,
        layout.kv_idx,
        layout.kv_num,
        layout.part_idx,
        layout.part_num,
        layout.part_bits,
        layout.q_seg,
        layout.kv_seg,
        layout.kv_lens,
        layout.block_q,
        layout.block_k,
        layout.causal_offset,
        q.shape[-1] ** -0.5 if scale is None else scale,
        num_splits,
    )
    if layout_fmt == "BNHD":
        out = out.transpose(1, 2)
    return (out, lse) if return_lse else out


def check_inputs(q: Tensor, k: Tensor, v: Tensor, layout: Any, num_splits: int) -> None:
    """Host-side checks that read no tensor values; ``layout`` is a :class:`BlockLayout`, or has its sizes."""
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1]:
        raise value_error(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}",
            WHERE,
            "Expected (B, H, N, D) with equal B and D, and v like k.",
        )
    if q.shape[1] % k.shape[1]:
        raise value_error(f"{q.shape[1]} heads over {k.shape[1]} KV heads", WHERE, "H must be a multiple of Hkv.")
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        raise type_error(f"q {q.dtype}, k {k.dtype}, v {v.dtype}", WHERE, "Cast them to one floating dtype.")
    if not q.device == k.device == v.device == layout.device:
        raise value_error(
            f"q on {q.device}, k on {k.device}, v on {v.device}, layout on {layout.device}",
            WHERE,
            "Move them together; layout.to(device) moves a layout.",
        )
    if any(x.stride(-1) != 1 and x.shape[-1] > 1 for x in (q, k, v)):
        raise value_error("the last dimension is strided", WHERE, "Call .contiguous() on that tensor.")
    if (layout.q_len, layout.kv_len) != (q.shape[2], k.shape[2]):
        raise layout_error(
            f"the layout is for {layout.q_len} x {layout.kv_len} tokens, the call has {q.shape[2]} x {k.shape[2]}",
            WHERE,
            "Build a layout for these lengths.",
        )
    if layout.batch not in (1, q.shape[0]) or layout.heads not in (1, q.shape[1]):
        raise layout_error(
            f"layout (B', H') = ({layout.batch}, {layout.heads}), call has {q.shape[0]} samples, {q.shape[1]} heads",
            WHERE,
            "Each must be 1 or match.",
        )
    if layout.kv_lens is not None and layout.kv_lens.numel() != q.shape[0]:
        raise layout_error(f"{layout.kv_lens.numel()} kv_lens, {q.shape[0]} samples", WHERE, "Give one per sample.")
    for name, seg in (("q_seg", layout.q_seg), ("kv_seg", layout.kv_seg)):
        if seg is not None and seg.dim() == 2 and seg.shape[0] not in (1, q.shape[0]):
            raise layout_error(f"{name} is for {seg.shape[0]} samples, the call has {q.shape[0]}", WHERE, "Match them.")
    if num_splits < 1:
        raise value_error(f"num_splits is {num_splits}", WHERE, "Use 1 or more.")


block_sparse_attention.plan = choose_path  # type: ignore[attr-defined]  # the query next to the call it describes
