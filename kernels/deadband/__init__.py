"""Dead-band filter along the token axis: keys as sparse changes (DeltaLLM, arXiv 2507.19608)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import gpu
from ..errors import refuse_gradient, type_error, value_error
from .blocked import dead_band_blocked

__all__ = ["dead_band"]

WHERE = "dead_band"


def dead_band(
    k: Tensor, theta: float | Tensor, *, reference: Tensor | None = None, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Keys as what the changes of more than ``theta`` add up to, element by element along the tokens.

    An element keeps its last passed-on value until it has moved away from it by more than ``theta``, so the result is
    within ``theta`` of ``k`` everywhere. To go on where an earlier call ended, give its last row as ``reference``.
    The sums are kept, not the changes: scores from either are equal, and the sums need no running total. Compared in
    fp32, whatever the dtype.

    Args:
        k: (B, Hkv, N, D), any strides.
        theta: 0 or more; one number, or a tensor that broadcasts to (B, Hkv).
        reference: (B, Hkv, D), the row before the first one; None: a sample's first row is taken whole.
        start: (B,) integers: first real token of each sample; rows before it stay as they are. Not with ``reference``.

    Returns:
        The keys (B, Hkv, N, D) in the dtype of ``k``; how many elements of each row changed, (B, Hkv, N) int32. A
        sample's first row counts as changed throughout, rows before ``start`` as unchanged.

    Raises:
        KernelValueError: shapes or numbers that do not fit.
        KernelTypeError: keys that are not floating.
        GradientError: when a gradient would be recorded.
    """
    if k.dim() != 4:
        raise value_error(f"k {tuple(k.shape)}", WHERE, "Expected (B, Hkv, N, D).")
    if not k.is_floating_point():
        raise type_error(f"k is {k.dtype}", WHERE, "Pass a floating tensor.")
    refuse_gradient(WHERE, k=k)
    B, H, N, D = k.shape
    if reference is not None and tuple(reference.shape) != (B, H, D):
        raise value_error(f"reference {tuple(reference.shape)}", WHERE, f"Expected {(B, H, D)}.")
    if reference is not None and start is not None:
        raise value_error("both reference and start", WHERE, "What goes on has begun: leave start out.")
    if start is not None and (tuple(start.shape) != (B,) or start.is_floating_point()):
        raise value_error(f"start {tuple(start.shape)} {start.dtype}", WHERE, f"Give one integer a sample, {B}.")
    if not N:
        return k.clone(), torch.zeros(B, H, 0, dtype=torch.int32, device=k.device)
    limit = thresholds(theta, k, WHERE)
    if triton_obstacle(k) is None:
        from .triton import dead_band_triton

        return dead_band_triton(k, limit, reference, start)
    return dead_band_blocked(k, limit, reference, start)


def triton_obstacle(k: Tensor) -> str | None:
    """Why plain torch takes a call and not the Triton kernel; None when the kernel does."""
    found = gpu.obstacle(k.device)
    if found is None:
        from .triton import unsupported

        found = unsupported(k)
    return found


def thresholds(theta: float | Tensor, k: Tensor, where: str, lowest: float = 0.0) -> Tensor:
    """``theta`` as a table (B, Hkv) fp32 on the device of ``k``. A number is checked, a tensor is not read."""
    if isinstance(theta, Tensor):
        try:
            return theta.to(k.device, torch.float32).broadcast_to(k.shape[:2]).contiguous()
        except RuntimeError as error:
            raise value_error(f"theta {tuple(theta.shape)}", where, f"It must fit {tuple(k.shape[:2])}.") from error
    if not theta >= lowest:
        raise value_error(f"theta is {theta}", where, f"Use {lowest:g} or more.")
    return torch.full(k.shape[:2], float(theta), dtype=torch.float32, device=k.device)
