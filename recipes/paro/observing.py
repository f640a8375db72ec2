"""Recipes that watch a dense run for the calibration: one for the orders, one for the masses of blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from patchkit import kernels
from patchkit.context import AttentionCall
from patchkit.errors import UnsupportedModel
from patchkit.recipe_base import Recipe
from patchkit.recipes.paro.geometry import Geometry
from patchkit.sites import Site

Next = Callable[[AttentionCall], Tensor]


class Watcher(Protocol):
    """What takes the figures of a calibration run."""

    block: int
    sites: list[Site]

    def wants(self, step: int, total: int) -> bool:
        """Whether this step is looked at."""

    def see(self, call: AttentionCall, lse: Tensor, geometry: Geometry, row: int) -> None:
        """One attention op with its row sums."""


@dataclass(frozen=True, kw_only=True)
class Observe(Recipe):
    """Leaves the run as it is and shows every self- and joint attention to ``watcher``."""

    watcher: Any = None

    name: ClassVar[str] = "paro calibration"
    kinds: ClassVar[tuple[str, ...]] = ("self", "joint")
    families: ClassVar[tuple[str, ...]] = ("diffusers",)

    def prepare(self, target: Any, sites: list[Site]) -> None:
        """Note the sites: they are the rows of the plan."""
        self.watcher.sites[:] = sites

    def attend(self, call: AttentionCall, next: Next) -> Tensor:
        """Dense, with its row sums at the steps that are looked at."""
        watcher = self.watcher
        if call.step is None or call.total is None:
            raise UnsupportedModel("nobody tells the step", call.site.full_name, "calibrate the pipeline, not a model")
        if not watcher.wants(call.step, call.total):
            return next(call)
        geometry = Geometry.of(call, watcher.block)
        if isinstance(geometry, str):
            raise UnsupportedModel(
                f"no plan can be made for this attention: {geometry}",
                call.site.full_name,
                "leave the module out with layers=, targets= or exclude=, or take smaller blocks",
            )
        call.ledger.count("watched")
        out, lse = _dense(call, next)
        row = next_row(watcher.sites, call.site)
        watcher.see(call, lse, geometry, row)
        return out


def next_row(sites: list[Site], site: Site) -> int:
    """The row of a site: its number among those selected."""
    names = [s.full_name for s in sites]
    return names.index(site.full_name)


def _dense(call: AttentionCall, next: Next) -> tuple[Tensor, Tensor]:
    """The op's output and the natural-log LSE of its rows."""
    grouped = call.q.shape[1] != call.k.shape[1]
    options: dict[str, Any] = {"scale": call.scale, "causal": call.causal, "enable_gqa": grouped}
    if call.mask is None:
        return kernels.dense_attention(call.q, call.k, call.v, **options, return_lse=True)
    mask = call.mask[:, None, None, :] if call.mask.ndim == 2 else call.mask
    return next(call), kernels.dense_attention(call.q, call.k, call.v, mask=mask, **options, return_lse=True)[1]


def image_part(call: AttentionCall, lse: Tensor, geometry: Geometry, codes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and row sums of the image blocks with every head's tokens in its order ``codes``."""
    grid = tuple(geometry.grid)
    options: dict[str, Any] = {"codes": codes, "grid": grid, "start": geometry.start}
    with torch.no_grad():
        (q,) = kernels.reorder_heads(call.q.detach(), **options)
        (k,) = kernels.reorder_heads(call.k.detach(), **options)
        (sums,) = kernels.reorder_heads(lse.unsqueeze(-1), **options)
    here = geometry.span
    return q[:, :, here], k[:, :, here], sums[:, :, here, 0]
