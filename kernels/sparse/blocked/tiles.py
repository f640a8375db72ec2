"""What one call of the blocked path has to do, sorted into work that can be computed together.

A *tile* is one query block of one (sample, head). Tiles that attend to equally many keys go through the same batched
products, whatever their head or sample: that is what keeps short sequences from being all overhead. Reading the lists
and sorting them takes about as long as attention over a thousand tokens, and a layout serves dozens of steps, so the
result is kept with the layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import layout_error
from ...layout import BlockLayout

# Tiles of one head that share a run of consecutive key blocks are read in place when there are this many. Fewer are
# cheaper to gather with the others: torch's kernel is slower on a few rows than the gather costs.
SHARED_RUN = 4


class Span(NamedTuple):
    """Samples b0..b1 and query heads h0..h1 computed in one go: several heads of one sample, or whole samples."""

    b0: int
    b1: int
    h0: int
    h1: int

    @property
    def heads(self) -> int:
        """Number of (sample, query head) pairs."""
        return (self.b1 - self.b0) * (self.h1 - self.h0)


@dataclass(frozen=True)
class Group:
    """Tiles start..stop of the plan's order, with equally many keys, each with a list of its own.

    Args:
        rows: (R,) int64, their rows in the layout's flattened lists.
        first: (R,) int64 number of the first key block of their KV head in the span.
        blocks: key blocks of each tile.
        tokens: keys of each tile; less than blocks * block_k where the last block is the ragged one.
    """

    start: int
    stop: int
    rows: Tensor
    first: Tensor
    blocks: int
    tokens: int


@dataclass(frozen=True)
class Run:
    """Tiles start..stop of the plan's order: of one head, and attending to the same keys lo..hi, which lie together."""

    start: int
    stop: int
    kv_head: int
    lo: int
    hi: int


@dataclass(frozen=True)
class Partial:
    """Query blocks ``rows`` (R,) of one head with ``count`` partial key blocks each, on top of their full ones.

    ``tiles`` (R,) are their places in the plan's order.
    """

    b: int
    h: int
    kv_head: int
    tiles: Tensor
    rows: Tensor
    count: int


@dataclass(frozen=True)
class Plan:
    """The work of one span.

    Args:
        groups: most keys first.
        runs: tiles that are read in place.
        partials: what comes on top.
        order: (tiles,) int64 the tiles (numbered head by head) as groups and runs follow each other.
        place: (tiles,) int64 its inverse.
        empty: tiles from this place on attend to no full block.
    """

    groups: list[Group]
    runs: list[Run]
    partials: list[Partial]
    order: Tensor
    place: Tensor
    empty: int


def plans_of(layout: BlockLayout, spans: Sequence[Span], lens: Sequence[int], share: int) -> list[Plan]:
    """Plans of the spans when sample b has ``lens[b]`` keys and ``share`` query heads use one KV head.

    Kept with the layout: they are made at its first call.
    """
    return [
        layout.derived(("tiles", span, tuple(lens), share), lambda span=span: _plan(layout, span, lens, share))  # type: ignore[misc]
        for span in spans
    ]


def _rows_table(layout: BlockLayout, span: Span, lens: Sequence[int]) -> list[list[int]]:
    """Of each tile: key blocks, first one, last one, whether complete, partial blocks, row of the lists."""
    device = layout.device
    num = layout.kv_num.to(torch.int64)
    complete = num == layout.valid_blocks
    slot = (num - 1).clamp(0, layout.kv_idx.shape[-1] - 1).unsqueeze(-1)
    first = layout.kv_idx[..., 0].to(torch.int64)
    last = layout.kv_idx.gather(-1, slot).squeeze(-1).to(torch.int64)
    part = torch.zeros_like(num) if layout.part_num is None else layout.part_num.to(torch.int64)
    row = torch.arange(num.numel(), device=device).view(num.shape)
    table = torch.stack([num, first, last, complete.to(torch.int64), part, row], dim=-1)
    if layout.batch > 1:
        table = table[span.b0 : span.b1]
    if layout.heads > 1:
        table = table[:, span.h0 : span.h1]
    table = table.expand(span.b1 - span.b0, span.h1 - span.h0, -1, -1).clone()
    valid = torch.tensor([-(-n // layout.block_k) for n in lens[span.b0 : span.b1]], device=device).view(-1, 1, 1)
    # The list of a complete row is implicit.
    whole = table[..., 3] > 0
    table[..., 0] = torch.where(whole, valid, table[..., 0])
    table[..., 1] = table[..., 1].masked_fill(whole, 0)
    table[..., 2] = torch.where(whole, valid - 1, table[..., 2])
    rows: list[list[int]] = table.flatten(0, 2).tolist()
    return rows


def _plan(layout: BlockLayout, span: Span, lens: Sequence[int], share: int) -> Plan:
    table = _rows_table(layout, span, lens)
    lists, runs, parts, empty = _sorted_tiles(table, layout, span, lens)
    n_q, n_k, heads = layout.n_q, layout.n_k, span.h1 - span.h0
    order: list[int] = []

    def tensor(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=layout.device)

    found_runs, groups = [], []
    for (head, lo, hi), tiles in runs.items():
        found_runs.append(Run(len(order), len(order) + len(tiles), head // share, max(0, lo), hi))
        order += tiles
    for (tokens, count), tiles in sorted(lists.items(), reverse=True):
        tiles.sort()
        rows, first = tensor([table[tile][5] for tile in tiles]), tensor([tile // n_q // share * n_k for tile in tiles])
        groups.append(Group(len(order), len(order) + len(tiles), rows, first, count, tokens))
        order += tiles
    last = len(order)
    order += empty
    place = [0] * len(order)
    for i, tile in enumerate(order):
        place[tile] = i
    partials = []
    for (head, count), tiles in parts.items():
        at, rows = tensor([place[tile] for tile in tiles]), tensor([tile % n_q for tile in tiles])
        partials.append(Partial(span.b0 + head // heads, span.h0 + head % heads, head // share, at, rows, count))
    return Plan(groups, found_runs, partials, tensor(order), tensor(place), last)


def _sorted_tiles(
    table: list[list[int]], layout: BlockLayout, span: Span, lens: Sequence[int]
) -> tuple[
    dict[tuple[int, int], list[int]], dict[tuple[int, int, int], list[int]], dict[tuple[int, int], list[int]], list[int]
]:
    """Tiles by (tokens, blocks), by run (head, lo, hi), by partial blocks (head, count), and without full ones."""
    bk, heads = layout.block_k, span.h1 - span.h0
    lists: dict[tuple[int, int], list[int]] = {}
    runs: dict[tuple[int, int, int], list[int]] = {}
    parts: dict[tuple[int, int], list[int]] = {}
    empty: list[int] = []
    for tile, (count, first, last, complete, part, _) in enumerate(table):
        head = tile // layout.n_q
        tokens = count * bk - max(0, (last + 1) * bk - lens[span.b0 + head // heads])
        if count and not (0 <= first <= last < layout.n_k and tokens > 0):  # an unchecked layout
            raise layout_error(f"a row lists blocks {first} to {last} of {layout.n_k}", "BlockLayout", "Validate it.")
        if count == 0:
            empty.append(tile)
        elif last - first + 1 == count:
            # Negative: complete rows, whose list is implicit, so that they must be read in place.
            runs.setdefault((head, -1 if complete else first * bk, first * bk + tokens), []).append(tile)
        else:
            lists.setdefault((tokens, count), []).append(tile)
        if part:
            parts.setdefault((head, part), []).append(tile)
    for key, tiles in list(runs.items()):
        if key[1] >= 0 and len(tiles) < SHARED_RUN:
            lists.setdefault((key[2] - key[1], -(-(key[2] - key[1]) // bk)), []).extend(tiles)
            del runs[key]
    return lists, runs, parts, empty
