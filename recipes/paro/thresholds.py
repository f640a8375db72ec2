"""Masks from block masses: one threshold for all blocks of a scope, found by bisection to the wanted density."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

ROUNDS = 64


def forced_blocks(mass: Tensor) -> Tensor:
    """Bool like mass (..., n, n): the heaviest block of every row and the diagonal one, which are always kept."""
    n = mass.shape[-1]
    best = torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, mass.argmax(-1, keepdim=True), True)
    return best | torch.eye(n, dtype=torch.bool, device=mass.device)


class Threshold(NamedTuple):
    """Blocks above ``tau`` are kept, and the first ``ties`` of those in (``below``, ``tau``], which are all equal."""

    tau: float
    below: float
    ties: int


Part = tuple[Tensor, Tensor]  # masses (..., n, n) and their forced blocks


def find_threshold(parts: Callable[[], Iterable[Part]], density: float) -> Threshold:
    """The threshold at which a share ``density`` of all blocks is kept, forced ones included.

    Args:
        parts: gives the masses of the scope and their forced blocks, some after others, each time it is called.
        density: wanted share. If the forced blocks alone are more, these alone are kept.
    """
    total, top = 0, 0.0
    for mass, _ in parts():
        total, top = total + mass.numel(), max(top, float(mass.max()))
    wanted = round(density * total)
    low, high = -1.0, top

    def kept(tau: float) -> int:
        return sum(int(((mass > tau) | forced).sum()) for mass, forced in parts())

    at_high = kept(high)
    for _ in range(ROUNDS):
        middle = float(torch.tensor((low + high) / 2, dtype=torch.float32))  # masses are compared in fp32
        if at_high == wanted or not low < middle < high:
            break
        count = kept(middle)
        if count <= wanted:
            high, at_high = middle, count
        else:
            low = middle
    return Threshold(high, low, max(0, wanted - at_high))


def mask_at(part: Part, threshold: Threshold) -> tuple[Tensor, int]:
    """Kept blocks (like the masses, bool), and how many of the threshold's ties they took."""
    mass, forced = part
    keep = (mass > threshold.tau) | forced
    if not threshold.ties:
        return keep, 0
    equal = (mass > threshold.below) & ~keep
    taken = equal & (equal.flatten().cumsum(0).view(equal.shape) <= threshold.ties)
    return keep | taken, int(taken.sum())


def masks_of(parts: Callable[[], Iterable[Part]], density: float) -> Iterable[tuple[Tensor, Tensor]]:
    """(masses, kept blocks) of a scope, part by part, at the wanted density."""
    threshold = find_threshold(parts, density)
    for part in parts():
        keep, taken = mask_at(part, threshold)
        threshold = threshold._replace(ties=threshold.ties - taken)
        yield part[0], keep


def kept_mass(mass: Tensor, keep: Tensor) -> Tensor:
    """Share (...) of the mass of blocks (..., n, n) that is kept; 1 where there is none."""
    total = mass.sum((-1, -2))
    share = (mass * keep).sum((-1, -2)) / total.clamp(min=1e-38)
    return torch.where(total > 0, share, torch.ones_like(share))
