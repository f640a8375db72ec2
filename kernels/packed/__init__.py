"""Attention over packed runs of keys and, from some position to the diagonal, over exact keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import gpu
from ..errors import refuse_gradient, type_error, value_error
from ..runs import Packed
from .blocked import packed_attention_blocked

__all__ = ["packed_attention"]

WHERE = "packed_attention"


def packed_attention(
    q: Tensor,
    packed: Packed,
    used: Tensor,
    k: Tensor,
    v: Tensor,
    exact_from: Sequence[int],
    *,
    chunk: int,
    first: int,
    scale: float | None = None,
) -> Tensor:
    """Two-phase causal attention: packed runs of the past first, exact keys up to the diagonal second, one softmax.

    A run of c tokens that share the key kh weighs c exp(scale * q . kh) and brings the mean of its values: a bias of
    log c on its logit. Queries are taken in blocks that begin at multiples of ``chunk``; all queries of a block see the
    same packed rows and the same first exact key. No L x N tensor is made. One query is decoding.

    Args:
        q: (B, H, L, D), queries at positions ``first`` to ``first + L - 1``.
        packed: runs of the past; heads with fewer runs end in rows of count 0.
        used: (blocks, B, Hkv) int32: how many packed rows, from the first one, the queries of a block see.
        k: (B, Hkv, T, D), exact keys of the last T positions, those of the queries included.
        v: (B, Hkv, T, Dv), Dv = D.
        exact_from: for each block the first position that it sees exactly: at least ``first + L - T``, at most the
            block's first query.
        chunk: queries of a block.
        first: position of the first query.
        scale: logit scale, default 1 / sqrt(D).

    Returns:
        (B, H, L, Dv) in the dtype of q.

    Raises:
        KernelValueError: shapes or positions that do not fit.
        KernelTypeError: different dtypes.
        GradientError: when a gradient would be recorded.
    """
    _check(q, packed, used, k, v, exact_from, chunk, first)
    refuse_gradient(WHERE, q=q, k=k, v=v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if triton_obstacle(q, k, chunk, len(exact_from)) is None:
        from .triton import packed_attention_triton

        return packed_attention_triton(q, packed, used, k, v, exact_from, chunk, first, scale)
    return packed_attention_blocked(q, packed, used, k, v, exact_from, chunk, first, scale)


def triton_obstacle(q: Tensor, k: Tensor, chunk: int, blocks: int) -> str | None:
    """Why plain torch takes a call with queries in so many blocks and not the Triton kernels; None when they do."""
    found = gpu.obstacle(q.device)
    if found is None:
        from .triton import unsupported

        found = unsupported(q, k, chunk, blocks)
    return found


def _check(
    q: Tensor, packed: Packed, used: Tensor, k: Tensor, v: Tensor, exact_from: Sequence[int], chunk: int, first: int
) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 4 or k.dim() != 4 or v.shape != k.shape or q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1]:
        raise value_error(shapes, WHERE, "Expected (B, H, L, D), and k and v (B, Hkv, T, D).")
    if q.shape[1] % k.shape[1] or not q.shape[2] or k.shape[2] < q.shape[2]:
        raise value_error(shapes, WHERE, "H must be a multiple of Hkv, and T at least L, which is at least 1.")
    if len({q.dtype, k.dtype, v.dtype, packed.keys.dtype, packed.values.dtype}) != 1:
        raise type_error(f"q {q.dtype}, k {k.dtype}, packed {packed.keys.dtype}", WHERE, "Cast them to one dtype.")
    if packed.keys.shape[:2] != k.shape[:2] or packed.counts.shape != packed.keys.shape[:3]:
        raise value_error(f"packed {tuple(packed.keys.shape)}", WHERE, f"Expected {tuple(k.shape[:2])} of (M, D).")
    if chunk < 1 or first < 0:
        raise value_error(f"chunk is {chunk}, first is {first}", WHERE, "Use 1 and 0 or more.")
    last = first + q.shape[2]
    blocks = (last - 1) // chunk - first // chunk + 1
    if len(exact_from) != blocks or tuple(used.shape) != (blocks, *k.shape[:2]) or used.dtype != torch.int32:
        got = f"exact_from {len(exact_from)}, used {tuple(used.shape)} {used.dtype}"
        raise value_error(got, WHERE, f"{blocks} blocks: give as many numbers and ({blocks}, B, Hkv) int32.")
    for block, start in enumerate(exact_from):
        if not last - k.shape[2] <= start <= max(first, (first // chunk + block) * chunk):
            raise value_error(
                f"block {block} is exact from {start}", WHERE, "That lies before the keys, or after its first query."
            )
