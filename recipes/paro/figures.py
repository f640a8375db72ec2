"""What a calibration gathers: figures of the candidate orders, and masses of blocks that live in files."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchkit import kernels
from patchkit.context import AttentionCall
from patchkit.errors import UnsupportedModel
from patchkit.kernels.reorder import distinct_orders
from patchkit.recipes.paro import scoring
from patchkit.recipes.paro.buckets import bucket_of
from patchkit.recipes.paro.geometry import Geometry
from patchkit.recipes.paro.observing import image_part
from patchkit.sites import Site

FIGURES = ("sparse", "quant", "kept")


@dataclass
class Seen:
    """What the sequences of a calibration look like; all must be alike but for the length of text behind the image."""

    geometry: Geometry | None = None
    total: int = 0
    text: dict[int, set[int]] = field(default_factory=dict)

    def check(self, geometry: Geometry, row: int, total: int, site: Site) -> None:
        """Take note of a sequence; raises UnsupportedModel where one plan cannot serve it and the others."""
        first = self.geometry or geometry
        self.text.setdefault(row, set()).add(geometry.text)
        self.total = total
        if geometry.grid != first.grid or geometry.count != first.count:
            raise UnsupportedModel(
                f"grid {tuple(geometry.grid)} of {geometry.count} image blocks; before: {tuple(first.grid)} of "
                f"{first.count}",
                site.full_name,
                "calibrate one size at a time, and leave out attention of another kind with exclude=",
            )
        if geometry.text_first and len(self.text[row]) > 1:
            raise UnsupportedModel(
                f"text stands first and has {sorted(self.text[row])} tokens",
                site.full_name,
                "use prompts of one length: what follows text of another length has other blocks",
            )
        self.geometry = first if first.text else geometry


class OrderFigures:
    """Averages of each candidate order's figures, over samples, steps and branches: (rows, H, candidates)."""

    def __init__(self, block: int, seen: Seen, settings: dict[str, Any]) -> None:
        self.block, self.seen, self.settings = block, seen, settings
        self.sites: list[Site] = []
        self.sums: dict[int, dict[str, Tensor]] = {}
        self.counts: dict[int, int] = {}
        self.codes: tuple[int, ...] = ()

    def wants(self, step: int, total: int) -> bool:
        """A few steps, in the middle of equal parts of the run."""
        parts = min(self.settings["order_steps"], total)
        return step in {(2 * i + 1) * total // (2 * parts) for i in range(parts)}

    def see(self, call: AttentionCall, lse: Tensor, geometry: Geometry, row: int) -> None:
        """One QK pass for every candidate, over some of the query blocks."""
        self.seen.check(geometry, row, call.total or 0, call.site)
        grid = tuple(geometry.grid)
        self.codes = self.settings["codes"] or distinct_orders(grid)  # type: ignore[arg-type]
        eps = self.settings["eps"]
        eps = scoring.EPS_AT / grid_tokens(geometry) if eps == "rel" else eps
        found: dict[str, list[Tensor]] = {name: [] for name in (*FIGURES, "share")}
        for code in self.codes:
            q, k, sums = image_part(call, lse, geometry, [code] * call.q.shape[1])
            rows = some_blocks(geometry.count, self.settings["query_stride"], self.block, q.device)
            q, sums = q[:, :, rows], sums[:, :, rows]
            total, peak, small = kernels.block_statistics(q, k, sums, self.block, eps, scale=call.scale)
            found["sparse"].append(scoring.skippable(small, self.block, self.settings["sigma"]).mean(0))
            found["quant"].append(scoring.incoherence(total, peak, self.block).mean(0))
            found["kept"].append(scoring.kept_share(total, self.settings["density"]).mean(0))
            found["share"].append((total.sum((-1, -2)) / rows.numel()).mean(0))
        kept = self.sums.setdefault(row, {})
        for name, values in found.items():
            value = torch.stack(values, -1).double().cpu()
            kept[name] = kept[name] + value if name in kept else value
        self.counts[row] = self.counts.get(row, 0) + 1

    def missing(self) -> list[str]:
        """Sites without figures."""
        return [site.full_name for row, site in enumerate(self.sites) if row not in self.counts]

    def to_tensors(self) -> dict[str, Tensor]:
        """For a file: the sums of every row and their counts."""
        rows, missing = range(len(self.sites)), self.missing()
        if missing:
            raise UnsupportedModel(f"{missing[0]} was never called", "calibrate", "leave it out with exclude=")
        sums = {name: torch.stack([self.sums[r][name] for r in rows]) for name in (*FIGURES, "share")}
        facts = {"count": torch.tensor([self.counts[r] for r in rows]), "codes": torch.tensor(self.codes)}
        return sums | facts


def grid_tokens(geometry: Geometry) -> int:
    """Image tokens of a sequence."""
    return geometry.grid.tokens


def some_blocks(count: int, stride: int, block: int, device: torch.device) -> Tensor:
    """Rows of every ``stride``-th of ``count`` blocks."""
    blocks = torch.arange(stride // 2 if stride // 2 < count else 0, count, stride, device=device)
    return (blocks[:, None] * block + torch.arange(block, device=device)).flatten()


class MassFigures:
    """Sums of block masses in the chosen orders, [masks, rows, H, n, n] fp32 in a file that is written as it grows."""

    def __init__(self, block: int, seen: Seen, order: Tensor, numbers: tuple[int, ...], path: Path) -> None:
        self.block, self.seen, self.order, self.numbers, self.path = block, seen, order, numbers, path
        self.sites: list[Site] = []
        assert seen.geometry is not None
        self.shape = mass_shape(order, numbers, seen.geometry.count)
        self.path.unlink(missing_ok=True)
        self.sums = mass_file(path, self.shape)
        self.counts = torch.zeros(self.shape[:2], dtype=torch.int64)
        self.part = path.with_suffix(".json")

    def wants(self, step: int, total: int) -> bool:
        """Every step counts."""
        return True

    def see(self, call: AttentionCall, lse: Tensor, geometry: Geometry, row: int) -> None:
        """One QK pass over all query blocks."""
        assert call.step is not None
        assert call.total is not None
        self.seen.check(geometry, row, call.total, call.site)
        number = self.numbers[bucket_of(call.step, call.total, len(self.numbers))]
        q, k, sums = image_part(call, lse, geometry, [int(c) for c in self.order[row]])
        mass = kernels.block_mass(q, k, sums.contiguous(), self.block, self.block, scale=call.scale)
        self.sums[number, row] += mass.mean(0).cpu()
        self.counts[number, row] += 1

    def finish(self) -> None:
        """Say that the file is whole."""
        part = self.part.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(self.counts.tolist()))
        part.replace(self.part)


def mass_shape(order: Tensor, numbers: tuple[int, ...], blocks: int) -> tuple[int, int, int, int, int]:
    """[masks, rows, H, n, n]."""
    return max(numbers) + 1, order.shape[0], order.shape[1], blocks, blocks


def mass_file(path: Path, shape: tuple[int, ...]) -> Tensor:
    """A tensor that lives in ``path``: long videos' masses do not fit into memory."""
    size = 1
    for n in shape:
        size *= n
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.float32).view(shape)
