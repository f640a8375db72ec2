"""Block statistics: sum, peak and number of small entries of each block of the attention map."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import gpu
from ..errors import refuse_gradient, type_error, value_error
from .blocked import block_statistics_blocked

__all__ = ["block_statistics"]

WHERE = "block_statistics"


@torch.library.custom_op("patchkit::block_statistics", mutates_args=())
def _statistics(
    q: Tensor, k: Tensor, lse: Tensor, block: int, eps: float, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    if gpu.obstacle(q.device) is None:
        from .triton import block_statistics_triton, unsupported

        if unsupported(q, block) is None:
            return block_statistics_triton(q, k, lse, block, eps, scale)
    with torch.autocast(q.device.type, enabled=False):
        total, peak, small = block_statistics_blocked(q, k, lse, block, eps, scale)
    return total.contiguous(), peak.clone(), small.clone()  # an operator's results share no memory


@_statistics.register_fake
def _(q: Tensor, k: Tensor, lse: Tensor, block: int, eps: float, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*q.shape[:2], (q.shape[2] + block - 1) // block, (k.shape[2] + block - 1) // block)
    return tuple(q.new_empty(shape, dtype=torch.float32) for _ in range(3))  # type: ignore[return-value]


def block_statistics(
    q: Tensor, k: Tensor, lse: Tensor, block: int = 64, eps: float = 1e-3, scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What PAROAttention (arXiv 2506.16054) asks of each block of P = exp(scale q k^T - LSE): one QK pass.

    Args:
        q: (B, H, q_len, D), contiguous D.
        k: (B, Hkv, kv_len, D); query head h uses KV head h // (H / Hkv).
        lse: (B, H, q_len) natural-log LSE of the rows.
        block: both sides of a block.
        eps: entries below it count as small.
        scale: logit scale, default 1 / sqrt(D).

    Returns:
        Sum, largest entry and number of small entries of every block, (B, H, Nq, Nk) fp32 each.

    Raises:
        KernelValueError: shapes that do not fit.
        KernelTypeError: q and k of different dtypes.
        GradientError: when a gradient would be recorded.
    """
    if (
        q.dim() != 4
        or k.dim() != 4
        or q.shape[0] != k.shape[0]
        or q.shape[-1] != k.shape[-1]
        or q.shape[1] % k.shape[1]
    ):
        raise value_error(f"q {tuple(q.shape)}, k {tuple(k.shape)}", WHERE, "Expected (B, H, N, D), H a multiple.")
    if q.dtype != k.dtype or not q.is_floating_point():
        raise type_error(f"q {q.dtype}, k {k.dtype}", WHERE, "Pass one floating dtype.")
    if tuple(lse.shape) != tuple(q.shape[:3]):
        raise value_error(f"lse {tuple(lse.shape)}", WHERE, f"Expected (B, H, q_len) = {tuple(q.shape[:3])}.")
    if block < 1 or not eps > 0:
        raise value_error(f"block {block}, eps {eps}", WHERE, "Both must be positive.")
    refuse_gradient(WHERE, q=q, k=k, lse=lse)
    return _statistics(q, k, lse, block, eps, q.shape[-1] ** -0.5 if scale is None else scale)
