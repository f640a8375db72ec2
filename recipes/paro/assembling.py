"""From block masses in files to the masks of a plan, a layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from patchkit.errors import UnsupportedModel
from patchkit.recipes.paro.packing import WORD, pack
from patchkit.recipes.paro.thresholds import Part, forced_blocks, kept_mass, masks_of

At = tuple[int, int, slice]  # mask, row, heads


class Masses:
    """Mean block masses over all prompts: sums [M, L, H, n, n] in files, and how many calls each (mask, row) had.

    A denoiser that works in a part of the run only (the second one of Wan 2.2) has no figures for the others: these
    masks are taken from the nearest time that has some.
    """

    def __init__(self, files: Sequence[Tensor], counts: Tensor) -> None:
        self.files, self.counts = files, counts
        self.shape = files[0].shape
        self.source = [[self._nearest(m, row) for row in range(self.shape[1])] for m in range(self.shape[0])]

    def _nearest(self, m: int, row: int) -> int:
        there = self.counts[:, row].nonzero().flatten().tolist()
        if not there:
            raise UnsupportedModel(f"row {row} has no figures", "calibrate", "leave that module out with exclude=")
        return int(min(there, key=lambda other: (abs(other - m), other)))

    def at(self, place: At) -> Tensor:
        """Mean masses (heads, n, n)."""
        m, row, heads = place
        source = self.source[m][row]
        total = torch.stack([file[source, row, heads] for file in self.files]).sum(0)
        return total / self.counts[source, row]


class Masks(NamedTuple):
    """The tensors of a plan: see :class:`PermutePlan`."""

    bits: Tensor
    kept_mass: Tensor
    density: Tensor


def assemble(masses: Masses, density: float, scope: str) -> Masks:
    """Masks at the wanted density over every scope."""
    M, L, H, n, _ = masses.shape
    found = Masks(torch.zeros(M, L, H, n, -(-n // WORD), dtype=torch.int32), torch.zeros(M, L, H), torch.zeros(M, L, H))
    for places in _scopes(M, L, H, scope):
        for (m, row, heads), (mass, keep) in zip(places, masks_of(_parts(masses, places), density), strict=True):
            found.bits[m, row, heads] = pack(keep)
            found.kept_mass[m, row, heads] = kept_mass(mass, keep)
            found.density[m, row, heads] = keep.float().mean((-1, -2))
    return found


def _parts(masses: Masses, places: list[At]) -> Callable[[], Iterable[Part]]:
    """The masses of a scope: kept if it is one layer's, read anew for each look otherwise."""
    if len(places) == 1:
        mass = masses.at(places[0])
        kept = [(mass, forced_blocks(mass))]
        return lambda: kept

    def stream() -> Iterable[Part]:
        for place in places:
            mass = masses.at(place)
            yield mass, forced_blocks(mass)

    return stream


def _scopes(M: int, L: int, H: int, scope: str) -> Iterable[list[At]]:
    """The places over which one threshold is found, for each scope."""
    layers = [[(m, row, slice(0, H)) for row in range(L)] for m in range(M)]
    if scope == "global":
        return [[place for some in layers for place in some]]
    if scope == "timestep":
        return layers
    if scope == "layer":
        return [[place] for some in layers for place in some]
    return [[(m, row, slice(h, h + 1))] for m in range(M) for row in range(L) for h in range(H)]
