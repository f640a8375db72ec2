"""Dense attention with LSE through the kernels torch itself would choose, so that outputs stay bit-identical.

``F.scaled_dot_product_attention`` drops the log-sum-exp its fused kernels compute. The aten operators underneath return
it; ``torch._fused_sdp_choice`` says which one SDPA would call for given inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import dense_attention_reference

MATH, FLASH, EFFICIENT, CUDNN = 0, 1, 2, 3
# Query rows per step of the unfused path: bounds its logits to CHUNK x kv_len per head.
CHUNK = 512


def dense_with_lse(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """Output (dtype of q) and natural-log LSE (B, H, q_len) fp32; see :func:`patchkit.kernels.dense_attention`."""
    gqa = q.shape[1] != k.shape[1]
    choice = int(torch._fused_sdp_choice(q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=gqa))
    if q.device.type == "cpu" and choice == FLASH:
        out, lse = cpu_flash(q, k, v, mask, scale, causal)
    elif q.device.type == "cuda" and choice in (FLASH, EFFICIENT, CUDNN):
        out, lse = _cuda(choice, q, k, v, mask, scale, causal)
    else:
        return _chunked(q, k, v, mask, scale, causal)
    return (out, lse) if mask is None else _empty_rows(out, lse, mask)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as SDPA's fused kernels take it: 0 / -inf in ``dtype`` for a bool mask, else unchanged."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


def cpu_flash(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """torch's CPU flash kernel: 4-D inputs of any strides with contiguous D; GQA by head count."""
    bias = None if mask is None else additive(mask, q.dtype)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=bias, scale=scale
    )
    return out, lse


def cpu_flash_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    scale: float | None,
    causal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`cpu_flash`'s output, by torch's own kernel, from the forward's ``out`` and ``lse``."""
    group = q.shape[1] // k.shape[1]
    if group > 1:
        # The kernel takes equal head counts only.
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    bias = None if mask is None else additive(mask, q.dtype)
    # A row without keys is all -inf under the bias; -inf less an LSE of -inf would be NaN.
    lse = lse.masked_fill(lse == float("-inf"), 0.0)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale
    )
    if group > 1:
        dk, dv = (x.unflatten(1, (-1, group)).sum(2, dtype=torch.float32).to(x.dtype) for x in (dk, dv))
    return dq, dk, dv


def _empty_rows(out: Tensor, lse: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Fused kernels report an LSE of 0 (or leave NaN) for a row without keys; give such rows 0 and -inf."""
    dead = ~(mask if mask.dtype == torch.bool else mask != float("-inf")).any(-1)
    dead = dead.broadcast_to(lse.shape)
    return out.masked_fill(dead.unsqueeze(-1), 0), lse.masked_fill(dead, float("-inf"))


def _cuda(
    choice: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """The CUDA kernel SDPA chose, called as SDPA calls it.

    The choice was made for these very tensors, so KV heads are not repeated: flash and cuDNN take fewer of them, and
    the memory-efficient kernel is not chosen for grouped heads.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    d, n = q.shape[-1], q.shape[2]
    aten = torch.ops.aten
    if choice == FLASH:
        # SDPA pads the head size to a multiple of 8 before its flash kernel.
        q, k, v = (F.pad(x, (0, -d % 8)) if d % 8 else x for x in (q, k, v))
        result = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
        return result[0][..., :d], result[1][..., :n].float()
    bias = None
    if mask is not None:
        bias = additive(mask, q.dtype)
        bias = bias.view((1,) * (4 - bias.dim()) + tuple(bias.shape))
    if choice == EFFICIENT:
        bias = None if bias is None else _aligned(bias, q, k)
        result = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, causal, scale=scale)
    else:
        # cuDNN broadcasts the bias over heads itself.
        result = aten._scaled_dot_product_cudnn_attention(q, k, v, bias, True, 0.0, causal, False, scale=scale)
    # The memory-efficient kernel rounds the rows of its LSE up to 32, cuDNN's has a dimension of 1 behind them.
    return result[0], result[1].reshape(*q.shape[:2], -1)[..., :n].float()


def _aligned(bias: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The bias (up to broadcasting) for the memory-efficient kernel, which wants its rows aligned to 8 elements.

    Padded before it is expanded, so that a mask shared by all heads is not copied for each; the slice keeps the
    padded stride.
    """
    n = k.shape[2]
    bias = bias.expand(*bias.shape[:3], n)
    if bias.stride(-1) != 1 or any(stride % 8 for stride in bias.stride()[:-1]):
        bias = F.pad(bias, (0, -n % 8)).contiguous()[..., :n]
    return bias.expand(*q.shape[:3], n)


def _chunked(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """Where no fused kernel applies: fp32 matmuls over chunks of query rows."""
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    for start in range(0, q.shape[2], CHUNK):
        rows = slice(start, min(q.shape[2], start + CHUNK))
        part = None
        if mask is not None:
            part = mask if mask.shape[-2] == 1 else mask[..., rows, :]
        elif causal:
            i = torch.arange(rows.start, rows.stop, device=q.device).view(-1, 1)
            part = torch.arange(k.shape[2], device=q.device) <= i
        out[:, :, rows], lse[:, :, rows] = dense_attention_reference(q[:, :, rows], k, v, part, scale)
    return out, lse
