"""Runs of similar keys as the definition reads, in fp32, one token after the other."""

from __future__ import annotations

import torch
from torch import Tensor


def find_runs_reference(
    k: Tensor, theta: float | Tensor, metric: str = "max", chunk: int = 128, single: int = 0, first: int = 0
) -> Tensor:
    """Where runs begin, (B, Hkv, N) bool: a row begins one where it is too far from the key that the run began with.

    Runs end at multiples of ``chunk``, and the tokens before position ``single`` are runs of one.
    """
    kf = k.float()
    B, H, N, _ = kf.shape
    limit = torch.as_tensor(theta, dtype=torch.float32).expand(B, H)
    begins = torch.zeros(B, H, N, dtype=torch.bool)
    for b in range(B):
        for h in range(H):
            anchor = kf[b, h, :1]  # set by the first row
            for n in range(N):
                t, row = first + n, kf[b, h, n]
                if n == 0 or t % chunk == 0 or t <= single or _far(row, anchor, metric, float(limit[b, h])):
                    begins[b, h, n], anchor = True, row
    return begins


def _far(row: Tensor, anchor: Tensor, metric: str, limit: float) -> bool:
    if metric == "max":
        return bool((row - anchor).abs().max() > limit)
    if metric == "euclidean":
        return bool((row - anchor).norm() > limit)
    return bool(torch.nn.functional.cosine_similarity(row, anchor, dim=0) < limit)


def pack_runs_reference(k: Tensor, v: Tensor, begins: Tensor) -> tuple[list[list[Tensor]], ...]:
    """Keys, values and counts of each (sample, head): the run's first key, the mean of its values, how many tokens."""
    keys: list[list[Tensor]] = []
    values: list[list[Tensor]] = []
    counts: list[list[Tensor]] = []
    for b in range(k.shape[0]):
        for out in (keys, values, counts):
            out.append([])
        for h in range(k.shape[1]):
            at = begins[b, h].nonzero().squeeze(-1).tolist()
            ends = [*at[1:], k.shape[2]]
            keys[b].append(torch.stack([k[b, h, i].float() for i in at]))
            values[b].append(torch.stack([v[b, h, i:j].float().mean(0) for i, j in zip(at, ends, strict=True)]))
            counts[b].append(torch.tensor([j - i for i, j in zip(at, ends, strict=True)]))
    return keys, values, counts
