"""Dense attention, optionally with its log-sum-exp, through the best kernel the library has."""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import refuse_gradient, type_error, value_error
from .library import dense_with_lse

__all__ = ["dense_attention"]

WHERE = "dense_attention"


@torch.library.custom_op("patchkit::dense_attention_lse", mutates_args=())
def _dense_lse(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, causal: bool
) -> tuple[Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        out, lse = dense_with_lse(q, k, v, mask, scale, causal)
    return out.contiguous(), lse.contiguous()


@_dense_lse.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, causal: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@overload
def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = ...,
    scale: float | None = ...,
    causal: bool = ...,
    return_lse: Literal[False] = ...,
    enable_gqa: bool = ...,
) -> Tensor: ...


@overload
def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = ...,
    scale: float | None = ...,
    causal: bool = ...,
    return_lse: Literal[True],
    enable_gqa: bool = ...,
) -> tuple[Tensor, Tensor]: ...


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    return_lse: bool = False,
    enable_gqa: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Dense attention; without ``return_lse`` it *is* ``F.scaled_dot_product_attention``, gradients included.

    With it, the kernel SDPA would choose is called directly, so the output is the same bit for bit.

    Args:
        q: (B, H, q_len, D).
        k: (B, Hkv, kv_len, D); Hkv < H needs ``enable_gqa``.
        v: as ``k``.
        mask: bool (True = attend) or additive, broadcastable to (B, H, q_len, kv_len).
        scale: logit scale, default 1 / sqrt(D).
        causal: lower-triangular mask aligned at the top left, as in SDPA; excludes ``mask``.
        return_lse: also return the natural-log LSE (B, H, q_len), fp32; rows without a key are 0 and -inf.
        enable_gqa: allow fewer KV heads; query head h uses KV head h // (H / Hkv).

    Raises:
        KernelValueError: shapes or head counts that do not fit, or ``mask`` together with ``causal``.
        KernelTypeError: q, k, v of different dtypes.
        GradientError: with ``return_lse``, when a gradient would be recorded.
    """
    if not return_lse:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, is_causal=causal, enable_gqa=enable_gqa
        )
    _check(q, k, v, mask, causal, enable_gqa)
    refuse_gradient(WHERE, q=q, k=k, v=v, mask=mask)
    if torch.is_autocast_enabled(q.device.type):
        # What SDPA does under autocast, so that the output stays the same bit for bit.
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x.to(dtype) for x in (q, k, v))
        mask = mask.to(dtype) if mask is not None and mask.is_floating_point() else mask
    return _dense_lse(q, k, v, mask, scale, causal)


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, enable_gqa: bool) -> None:
    if q.dim() != 4 or k.dim() != 4 or v.shape != k.shape or q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1]:
        raise value_error(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}", WHERE, "Expected (B, H, N, D), k like v."
        )
    if not q.dtype == k.dtype == v.dtype:
        raise type_error(f"q {q.dtype}, k {k.dtype}, v {v.dtype}", WHERE, "Cast them to one dtype.")
    if q.shape[1] != k.shape[1] and (not enable_gqa or q.shape[1] % k.shape[1]):
        raise value_error(
            f"{q.shape[1]} query heads, {k.shape[1]} KV heads", WHERE, "Pass enable_gqa=True and a divisor."
        )
    if causal and mask is not None:
        raise value_error("both mask and causal", WHERE, "Put the diagonal into the mask.")
