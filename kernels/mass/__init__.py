"""Block mass: how much softmax probability each block of the attention map holds."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from .. import gpu
from ..errors import refuse_gradient, type_error, value_error
from .blocked import block_mass_blocked

__all__ = ["block_mass"]

WHERE = "block_mass"


@torch.library.custom_op("patchkit::block_mass", mutates_args=())
def _block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    block_q: int,
    block_k: int,
    kv_lens: Tensor | None,
    row_sum: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    if triton_obstacle(q, block_q, block_k) is None:
        from .triton import block_mass_triton

        return block_mass_triton(q, k, lse, block_q, block_k, kv_lens, row_sum, scale)
    # Precision is this operator's business: under the caller's autocast its fp32 matmuls would become bf16.
    with torch.autocast(q.device.type, enabled=False):
        return block_mass_blocked(q, k, lse, block_q, block_k, kv_lens, row_sum, scale)


@_block_mass.register_fake
def _(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    block_q: int,
    block_k: int,
    kv_lens: Tensor | None,
    row_sum: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    n_q, n_k = (q.shape[2] + block_q - 1) // block_q, (k.shape[2] + block_k - 1) // block_k
    sums = q.new_empty(q.shape[:3] if row_sum else (0,), dtype=torch.float32)
    return q.new_empty((q.shape[0], q.shape[1], n_q, n_k), dtype=torch.float32), sums


def triton_obstacle(q: Tensor, block_q: int, block_k: int) -> str | None:
    """Why the blocked path takes this call and not the Triton kernel; None when the kernel does."""
    found = gpu.obstacle(q.device)
    if found is None:
        from .triton import unsupported

        found = unsupported(q, block_q, block_k)
    return found


@overload
def block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    block_q: int,
    block_k: int,
    kv_lens: Tensor | None = ...,
    return_row_sum: Literal[False] = ...,
    scale: float | None = ...,
    validate: bool = ...,
) -> Tensor: ...


@overload
def block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    block_q: int,
    block_k: int,
    kv_lens: Tensor | None = ...,
    *,
    return_row_sum: Literal[True],
    scale: float | None = ...,
    validate: bool = ...,
) -> tuple[Tensor, Tensor]: ...


def block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    block_q: int,
    block_k: int,
    kv_lens: Tensor | None = None,
    return_row_sum: bool = False,
    scale: float | None = None,
    validate: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Sum of exp(scale * q.k - LSE) over each block (AdaSpa, arXiv 2502.21079): one QK pass, no L x L tensor.

    With the LSE of these q and k a row of blocks sums to its number of valid query rows. With an older LSE, row i sums
    to r_i = exp(LSE_new - LSE_old), and LSE_old + log r_i is the exact new LSE.

    Args:
        q: (B, H, q_len, D), contiguous D.
        k: (B, Hkv, kv_len, D), contiguous D; query head h uses KV head h // (H / Hkv).
        lse: (B, H, q_len) natural-log LSE; rows at -inf count as 0.
        block_q: query rows per block.
        block_k: keys per block.
        kv_lens: (B,) valid keys; later keys are not read and count as 0.
        return_row_sum: also return r (B, H, q_len) fp32.
        scale: logit scale, default 1 / sqrt(D).
        validate: False skips the argument checks.

    Returns:
        W (B, H, Nq, Nk) fp32 [, r]. The exponent is limited to 30, so that a stale LSE cannot overflow.

    Raises:
        KernelValueError: shapes that do not fit.
        KernelTypeError: q and k of different dtypes.
        GradientError: when a gradient would be recorded.
    """
    if validate:
        _check(q, k, lse, block_q, block_k, kv_lens)
    refuse_gradient(WHERE, q=q, k=k, lse=lse)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    W, sums = _block_mass(q, k, lse, block_q, block_k, kv_lens, return_row_sum, scale)
    return (W, sums) if return_row_sum else W


def _check(q: Tensor, k: Tensor, lse: Tensor, block_q: int, block_k: int, kv_lens: Tensor | None) -> None:
    if q.dim() != 4 or k.dim() != 4 or q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1]:
        raise value_error(f"q {tuple(q.shape)}, k {tuple(k.shape)}", WHERE, "Expected (B, H, N, D) with equal B and D.")
    if q.shape[1] % k.shape[1]:
        raise value_error(f"{q.shape[1]} heads over {k.shape[1]} KV heads", WHERE, "H must be a multiple of Hkv.")
    if q.dtype != k.dtype or not q.is_floating_point():
        raise type_error(f"q {q.dtype}, k {k.dtype}", WHERE, "Pass one floating dtype.")
    if tuple(lse.shape) != tuple(q.shape[:3]):
        raise value_error(f"lse {tuple(lse.shape)}", WHERE, f"Expected (B, H, q_len) = {tuple(q.shape[:3])}.")
    if block_q < 1 or block_k < 1:
        raise value_error(f"blocks {block_q} x {block_k}", WHERE, "Use positive sizes.")
    if not q.device == k.device == lse.device:
        raise value_error(f"q on {q.device}, k on {k.device}, lse on {lse.device}", WHERE, "Move them together.")
    if kv_lens is not None and tuple(kv_lens.shape) != (q.shape[0],):
        raise value_error(f"kv_lens {tuple(kv_lens.shape)}", WHERE, "Give one length per sample.")
