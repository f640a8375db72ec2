"""Runs of similar neighbouring keys, and their packed form: one key, one mean value and a count a run.

The token-level form of DeltaLLM (arXiv 2507.19608). All tokens of a run share one key, so attention over them is
attention over that key with weight c e^s and the mean of their values: nothing is lost but the differences of the keys.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .. import gpu
from ..deadband import thresholds
from ..errors import refuse_gradient, type_error, value_error
from .blocked import find_runs_blocked, pack_runs_blocked

__all__ = ["Metric", "Packed", "find_runs", "pack_runs"]

Metric = Literal["max", "euclidean", "cosine"]
METRICS = ("max", "euclidean", "cosine")


class Packed(NamedTuple):
    """Packed keys and values.

    Args:
        keys: (B, Hkv, M, D).
        values: (B, Hkv, M, Dv), means over the runs.
        counts: (B, Hkv, M) int32: tokens of each run. Heads with fewer runs end in rows of count 0, which weigh
            nothing.
    """

    keys: Tensor
    values: Tensor
    counts: Tensor


def find_runs(
    k: Tensor,
    theta: float | Tensor,
    *,
    metric: Metric = "max",
    chunk: int = 128,
    single: int = 0,
    first: int = 0,
) -> Tensor:
    """Where runs begin: a key begins one where it is too far from the key that the present run began with.

    Args:
        k: (B, Hkv, N, D), any strides. Compared in fp32.
        theta: one number, or a tensor that broadcasts to (B, Hkv). A key is too far when its largest difference
            (``"max"``) or its distance (``"euclidean"``) is above ``theta``, or its cosine (``"cosine"``) below.
        metric: the measure.
        chunk: runs do not cross positions that are multiples of this.
        single: tokens before this position are runs of one.
        first: position of ``k[:, :, 0]``, a multiple of ``chunk``.

    Returns:
        (B, Hkv, N) bool, True where a run begins; always at the first token.

    Raises:
        KernelValueError: shapes or numbers that do not fit.
        KernelTypeError: keys that are not floating.
        GradientError: when a gradient would be recorded.
    """
    where = "find_runs"
    if k.dim() != 4:
        raise value_error(f"k {tuple(k.shape)}", where, "Expected (B, Hkv, N, D).")
    if not k.is_floating_point():
        raise type_error(f"k is {k.dtype}", where, "Pass a floating tensor.")
    if metric not in METRICS:
        raise value_error(f"metric is {metric!r}", where, f"Use one of {', '.join(METRICS)}.")
    if chunk < 1 or first % chunk or first < 0:
        raise value_error(f"chunk is {chunk}, first is {first}", where, "first must be a multiple of chunk.")
    refuse_gradient(where, k=k)
    limit = thresholds(theta, k, where, lowest=-1.0 if metric == "cosine" else 0.0)
    if not k.shape[2]:
        return torch.zeros(k.shape[:3], dtype=torch.bool, device=k.device)
    if triton_obstacle(k) is None:
        from .triton import find_runs_triton

        return find_runs_triton(k, limit, metric, chunk, single, first)
    return find_runs_blocked(k, limit, metric, chunk, single, first)


def pack_runs(k: Tensor, v: Tensor, begins: Tensor, *, mean_keys: bool = False) -> Packed:
    """One row a run: its first key (or the mean of its keys), the mean of its values, and how many tokens it has.

    Reads the largest number of runs of a head once from the device: it is the size of the result.

    Args:
        k: (B, Hkv, N, D), any strides.
        v: (B, Hkv, N, Dv).
        begins: (B, Hkv, N) bool from :func:`find_runs`, True at the first token.
        mean_keys: give a run the mean of its keys, which is nearer to them on average, but without a hard bound.

    Returns:
        :class:`Packed`, rows in the order of the tokens; means are summed in fp32.

    Raises:
        KernelValueError: shapes that do not fit.
        KernelTypeError: ``begins`` is not bool.
        GradientError: when a gradient would be recorded.
    """
    where = "pack_runs"
    if k.dim() != 4 or v.dim() != 4 or v.shape[:3] != k.shape[:3] or begins.shape != k.shape[:3]:
        shapes = f"k {tuple(k.shape)}, v {tuple(v.shape)}, begins {tuple(begins.shape)}"
        raise value_error(shapes, where, "Expected (B, Hkv, N, D), (B, Hkv, N, Dv) and (B, Hkv, N).")
    if begins.dtype != torch.bool:
        raise type_error(f"begins is {begins.dtype}", where, "Pass a bool tensor.")
    refuse_gradient(where, k=k, v=v)
    if k.shape[2] and triton_obstacle(k, v) is None:
        from .triton import pack_runs_triton

        return Packed(*pack_runs_triton(k, v, begins, mean_keys))
    return Packed(*pack_runs_blocked(k, v, begins, mean_keys))


def triton_obstacle(*tensors: Tensor) -> str | None:
    """Why plain torch takes keys, or keys and values, and not the Triton kernel; None when the kernel does."""
    found = gpu.obstacle(tensors[0].device)
    if found is None:
        from .triton import unsupported

        found = next((reason for x in tensors if (reason := unsupported(x)) is not None), None)
    return found
