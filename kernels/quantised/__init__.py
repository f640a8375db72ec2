"""Quantised attention: INT8, INT4 and fp8 products, dense or over the blocks of a layout."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from .. import gpu
from ..errors import layout_error, refuse_gradient, value_error
from ..layout import BlockLayout
from ..layout.recall import recall, remember
from ..reorder import reorder_heads
from ..sparse import check_inputs
from .blocked import quantised_blocked
from .dense import PlainSizes, dense_layout
from .formats import PV, QK, WHERE, Format, Reorder, Scale

__all__ = ["Format", "Reorder", "quantised_attention", "quantised_path"]


@torch.library.custom_op("patchkit::quantised_attention", mutates_args=())
def _quantised(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_idx: Tensor | None,
    kv_num: Tensor | None,
    kv_lens: Tensor | None,
    block_q: int,
    block_k: int,
    qk: str,
    pv: str,
    smooth_k: bool,
    smooth_v: bool,
    p_scale: str,
    scale: float,
    codes: list[int],
    grid: list[int],
    start: int,
) -> tuple[Tensor, Tensor]:
    if kv_idx is None or kv_num is None:
        layout = dense_layout(q, k, kv_lens)
    else:
        layout = recall(BlockLayout(block_q, block_k, q.shape[2], k.shape[2], kv_idx, kv_num, kv_lens=kv_lens))
    form = Format(qk, pv, smooth_k, smooth_v, p_scale)  # type: ignore[arg-type]
    reorder = Reorder(tuple(codes), (grid[0], grid[1], grid[2]), start) if codes else None
    with torch.autocast(q.device.type, enabled=False):
        if triton_obstacle(q, layout, form) is None:
            from .triton.launch import quantised_triton

            return quantised_triton(q, k, v, layout, form, scale, reorder)
        if reorder is None:
            out, lse = quantised_blocked(q, k, v, layout, form, scale)
            return out.contiguous(), lse.contiguous()
        order: dict[str, Any] = {"codes": reorder.codes, "grid": reorder.grid, "start": reorder.start}
        q, k, v = (reorder_heads(x, **order)[0] for x in (q, k, v))
        out, lse = quantised_blocked(q, k, v, layout, form, scale)
        (out,) = reorder_heads(out, **order, inverse=True)
        (lse,) = reorder_heads(lse.unsqueeze(-1), **order, inverse=True)
        return out, lse.squeeze(-1).contiguous()


@_quantised.register_fake
def _(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


def triton_obstacle(q: Tensor, layout: BlockLayout, form: Format) -> str | None:
    """Why the plain-torch simulation takes this call and not the Triton kernels; None when they do."""
    found = gpu.obstacle(q.device)
    if found is None:
        from .triton.table import unsupported

        found = unsupported(q, layout, form)
    return found


def quantised_path(q: Tensor, layout: BlockLayout, form: Format) -> tuple[str, str]:
    """("triton" or "blocked", why): which implementation a call takes."""
    missing = triton_obstacle(q, layout, form)
    return ("triton", "Triton kernel") if missing is None else ("blocked", f"{missing}: the rounding is simulated")


@overload
def quantised_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout | None = ...,
    *,
    qk: QK = ...,
    pv: PV = ...,
    smooth_k: bool = ...,
    smooth_v: bool = ...,
    p_scale: Scale = ...,
    scale: float | None = ...,
    kv_lens: Tensor | None = ...,
    reorder: Reorder | None = ...,
    return_lse: Literal[False] = ...,
    layout_fmt: Literal["BHND", "BNHD"] = ...,
) -> Tensor: ...


@overload
def quantised_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout | None = ...,
    *,
    qk: QK = ...,
    pv: PV = ...,
    smooth_k: bool = ...,
    smooth_v: bool = ...,
    p_scale: Scale = ...,
    scale: float | None = ...,
    kv_lens: Tensor | None = ...,
    reorder: Reorder | None = ...,
    return_lse: Literal[True],
    layout_fmt: Literal["BHND", "BNHD"] = ...,
) -> tuple[Tensor, Tensor]: ...


def quantised_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout | None = None,
    *,
    qk: QK = "int8",
    pv: PV = "none",
    smooth_k: bool = True,
    smooth_v: bool = True,
    p_scale: Scale = "block",
    scale: float | None = None,
    kv_lens: Tensor | None = None,
    reorder: Reorder | None = None,
    return_lse: bool = False,
    layout_fmt: Literal["BHND", "BNHD"] = "BHND",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention with 8- or 4-bit products (PAROAttention, arXiv 2506.16054; SageAttention 1 and 2).

    Q is rounded in groups of 32 tokens, K in blocks of 64, V by channel, P in blocks of 64 x 64 or by row of such a
    block; integer products are exact, softmax and sums are fp32. On a GPU these are tensor-core products; elsewhere the
    rounding is simulated, at a cost. Typical relative L1 error on Gaussian inputs: 0.01 to 0.02 with INT8 QK, 0.03 with
    INT8 PV by block and 0.015 by row. The inputs are not changed.

    Args:
        q: (B, H, q_len, D), or (B, q_len, H, D) with ``layout_fmt="BNHD"``; any strides with contiguous D.
        k: the same with Hkv heads and kv_len tokens.
        v: as ``k``.
        layout: which blocks are computed (full blocks only); None = all.
        qk: numbers of the first product: ``"int8"``, ``"int4"`` (rounding of INT4 in 8-bit products), ``"none"``.
        pv: numbers of the second: as ``qk``, or ``"fp8"`` (e4m3).
        smooth_k: take the mean over tokens off K first. The LSE is that of the unsmoothed logits.
        smooth_v: take the mean over tokens off V and add it to the output.
        p_scale: ``"block"`` or ``"row"``; ``"static"`` (1 / 127) is an ablation.
        scale: logit scale, default 1 / sqrt(D).
        kv_lens: (B,) valid keys, without a layout (which has its own); what lies behind is not read.
        reorder: read the tokens of each head in this order and write the output back in the model's; the layout is
            then over the reordered tokens.
        return_lse: also return the natural-log LSE (B, H, q_len), fp32.
        layout_fmt: order of the dimensions of q, k, v and the output.

    Returns:
        Output in q's dtype and format [, LSE]. Rows without a key are 0 and -inf.

    Raises:
        KernelValueError: shapes or options that do not fit (LayoutError: the layout is at fault).
        KernelTypeError: dtypes that differ.
        GradientError: when a gradient would be recorded.
    """
    Format(qk, pv, smooth_k, smooth_v, p_scale)  # checks them
    if layout_fmt == "BNHD":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    elif layout_fmt != "BHND":
        raise value_error(f"layout_fmt is {layout_fmt!r}", WHERE, "Use 'BHND' or 'BNHD'.")
    if layout is not None:
        _check_layout(layout, kv_lens)
    check_inputs(q, k, v, layout or PlainSizes(q, k, kv_lens), 1)
    refuse_gradient(WHERE, q=q, k=k, v=v)
    order = reorder.checked(q.shape[1], min(q.shape[2], k.shape[2])) if reorder is not None else Reorder((), (1, 1, 1))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    lists: tuple[Any, ...] = (None, None, kv_lens, 0, 0)
    if layout is not None:
        lists = (layout.kv_idx, layout.kv_num, layout.kv_lens, layout.block_q, layout.block_k)
    options = (qk, pv, smooth_k, smooth_v, p_scale, scale)
    out, lse = _quantised(q, k, v, *lists, *options, list(order.codes), list(order.grid), order.start)
    if layout_fmt == "BNHD":
        out = out.transpose(1, 2)
    return (out, lse) if return_lse else out


def _check_layout(layout: BlockLayout, kv_lens: Tensor | None) -> None:
    if kv_lens is not None:
        raise value_error("both a layout and kv_lens", WHERE, "Put kv_lens into the layout.")
    if layout.part_idx is not None:
        raise layout_error("the layout has partial blocks", WHERE, "Quantised attention takes full blocks only.")
    if torch.compiler.is_compiling():
        return
    if layout.device.type == "cpu":
        layout.validate()
    else:
        remember(layout)
