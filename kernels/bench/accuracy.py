"""Relative RMS error on sampled query blocks against fp32, without anything of the size of the attention map."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import BlockLayout
from ..layout.convert import scatter_lists

# Rounding of inputs, probabilities and output; fp32 on a GPU is three TF32 products.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
SAMPLES = 8


def allowed_pairs(layout: BlockLayout, b: int, h: int, p: int) -> Tensor:
    """(rows, kv_len) bool: which keys each row of query block ``p`` of one sample and head attends to."""
    lb, lh = b if layout.batch > 1 else 0, h if layout.heads > 1 else 0
    at = slice(p, p + 1)
    valid = int(layout.valid_blocks[lb if layout.valid_blocks.shape[0] > 1 else 0])
    if int(layout.kv_num[lb, lh, p]) == valid:
        full = (torch.arange(layout.n_k, device=layout.device) < valid).unsqueeze(0)
    else:
        full = scatter_lists(layout.kv_idx[lb, lh, at], layout.kv_num[lb, lh, at], layout.n_k)
    start, stop = p * layout.block_q, min(layout.q_len, (p + 1) * layout.block_q)
    keys = torch.arange(layout.kv_len, device=layout.device)
    pairs = full[0, keys // layout.block_k].expand(stop - start, -1).clone()
    if layout.part_idx is not None and layout.part_num is not None:
        some = scatter_lists(layout.part_idx[lb, lh, at], layout.part_num[lb, lh, at], layout.n_k)
        rows = torch.arange(start, stop, device=layout.device)
        part = some[0, keys // layout.block_k] & layout.rule.pairs(b, rows.unsqueeze(-1), keys)
        pairs |= part & _stored(layout, lb, lh, p, stop - start) if layout.part_bits is not None else part
    if layout.kv_lens is not None:
        pairs &= keys < layout.kv_lens[b if layout.kv_lens.numel() > 1 else 0]
    return pairs


def _stored(layout: BlockLayout, b: int, h: int, p: int, rows: int) -> Tensor:
    """(rows, kv_len) stored bits of the partial blocks of query block ``p``."""
    bits = layout.partial_bits(b, h, torch.tensor([p], device=layout.device))
    assert bits is not None
    assert layout.part_idx is not None
    assert layout.part_num is not None
    grid = torch.zeros(rows, layout.n_k, layout.block_k, dtype=torch.bool, device=layout.device)
    for slot in range(int(layout.part_num[b, h, p])):
        grid[:, int(layout.part_idx[b, h, p, slot])] = bits[0, slot, :rows]
    return grid.flatten(1)[:, : layout.kv_len]


def sampled_error(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout | None, causal: bool = False, block: int = 64
) -> float:
    """Relative RMS error of ``out`` (B, H, N, D) on up to 8 query blocks: first, last, and others of other heads.

    Args:
        out: what is judged.
        q: (B, H, N, D).
        k: (B, Hkv, M, D).
        v: as ``k``.
        layout: the pattern; None = dense.
        causal: with ``layout=None``: key n is seen iff n <= i.
        block: rows of a sample with ``layout=None``.

    Returns:
        Infinity when there is a NaN in the sampled rows.
    """
    B, H, N, _ = q.shape
    block = block if layout is None else layout.block_q
    count, group = -(-N // block), H // k.shape[1]
    wrong, size = 0.0, 0.0
    for i in range(min(SAMPLES, count)):
        b, h, p = i % B, (i * 5) % H, i * (count - 1) // max(1, min(SAMPLES, count) - 1)
        rows = slice(p * block, min(N, (p + 1) * block))
        if layout is not None:
            pairs = allowed_pairs(layout, b, h, p)
        else:
            pairs = _dense_pairs(rows, k.shape[2], causal, q.device)
        logits = (q[b, h, rows].float() @ k[b, h // group].float().T * q.shape[-1] ** -0.5).masked_fill(
            ~pairs, -torch.inf
        )
        weights = torch.softmax(logits, -1).masked_fill(~pairs.any(-1, keepdim=True), 0.0)
        # A zero weight times NaN is NaN: dropped keys may hold anything.
        exact = weights @ v[b, h // group].float().masked_fill(~pairs.any(0).unsqueeze(-1), 0.0)
        wrong += float((out[b, h, rows].double() - exact.double()).square().sum())
        size += float(exact.double().square().sum())
    return (wrong / max(size, 1e-30)) ** 0.5 if wrong == wrong else float("inf")


def _dense_pairs(rows: slice, keys: int, causal: bool, device: torch.device) -> Tensor:
    at = torch.arange(rows.start, rows.stop, device=device).unsqueeze(-1)
    seen = torch.arange(keys, device=device)
    return seen <= at if causal else (seen >= 0).expand(at.shape[0], -1)
