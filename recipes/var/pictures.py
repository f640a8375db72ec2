"""Where the sinks lie: figures for the report, and maps over the image grid."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from patchkit.errors import InvalidOption
from patchkit.kernels.redistribute import TEXT_SINK, VISUAL_SINK

if TYPE_CHECKING:
    from PIL.Image import Image

    from patchkit.recipes.var.sinks import KeyMap
    from patchkit.report import Report

CELL = 12  # pixels of an image token
PICTURES = 6  # at most, of one report


def counts(keys: KeyMap) -> dict[str, Any]:
    """Sinks a sample, and where the visual ones lie.

    ``images`` maps a sample to the lengths of its runs of visual tokens, ``sinks`` to the numbers of those that are
    sinks, counted over all its visual tokens.
    """
    text, visual = (keys.classes == kind for kind in (TEXT_SINK, VISUAL_SINK))
    seen = keys.visual.expand(len(keys.classes), -1)
    where = {str(b): visual[b][seen[b]].nonzero()[:, 0].tolist() for b in range(len(seen))}
    runs = {str(b): _runs(seen[b].nonzero()[:, 0]) for b in range(len(seen))}
    return {"text_sinks": text.sum(1), "visual_sinks": visual.sum(1), "images": runs, "sinks": where}


def _runs(places: Tensor) -> list[int]:
    """Lengths of the runs of neighbouring numbers."""
    if not len(places):
        return []
    ends = (places.diff() != 1).nonzero()[:, 0] + 1
    edges = [0, *ends.tolist(), len(places)]
    return [b - a for a, b in itertools.pairwise(edges)]


def sink_map(report: Report, sample: int = 0, image: int = 0, grid: tuple[int, int] | None = None) -> Tensor:
    """How often each token of an image was a sink: the share of edited layers, (rows, columns) fp32.

    Args:
        report: ``patch.report()`` after a run with VAR.
        sample: which of the batch.
        image: which of its images: runs of visual tokens, so tiles with text between them count one by one.
        grid: (rows, columns) of its tokens; None = a square. Of tokens that are left over (LLaVA-NeXT's tiles and
            newlines), rows as long as the square root holds are made; places without a token are 0.

    Raises:
        InvalidOption: there is no such image, or the grid has not its number of tokens.
    """
    found = [values for account in report["recipes"] if account["recipe"] == "var" for values in _noted(account)]
    return _map(found, sample, image, grid)


def _noted(account: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What :func:`counts` found at each edited layer."""
    return [row["values"] for row in account["rows"] if "sinks" in row["values"]]


def _map(found: list[Mapping[str, Any]], sample: int, image: int, grid: tuple[int, int] | None) -> Tensor:
    lengths = found[0]["images"].get(str(sample), []) if found else []
    if not 0 <= image < len(lengths):
        raise InvalidOption(
            f"image {image} of sample {sample}: the report tells of {len(lengths)}",
            "sink_map",
            "run VAR on images first",
        )
    start, length = sum(lengths[:image]), lengths[image]
    share = torch.zeros(length)
    for values in found:
        inside = [s - start for s in values["sinks"][str(sample)] if start <= s < start + length]
        share[inside] += 1 / len(found)
    if grid is None:
        side = math.isqrt(length - 1) + 1
        grid = (-(-length // side), side)
        share = torch.nn.functional.pad(share, (0, grid[0] * grid[1] - length))
    if grid[0] * grid[1] != len(share):
        raise InvalidOption(f"a grid of {grid[0]} x {grid[1]} for {length} tokens", "sink_map", "give the right one")
    return share.view(grid)


def sink_picture(
    report: Report, sample: int = 0, image: int = 0, grid: tuple[int, int] | None = None, under: Image | None = None
) -> Image:
    """:func:`sink_map` as a picture: the redder a token, the more layers it is a sink in.

    Args:
        report: as of :func:`sink_map`, like ``sample``, ``image`` and ``grid``.
        under: the image itself, to lay the map over.
    """
    return _drawn(sink_map(report, sample, image, grid), under)


def all_pictures(account: Mapping[str, Any]) -> dict[str, Image]:
    """A sink map of each image of each sample, the first few of them."""
    found = _noted(account)
    places = [(int(b), n) for b, runs in (found[0]["images"] if found else {}).items() for n in range(len(runs))]
    several = len({b for b, _ in places}) > 1
    return {
        f"sinks of image {n + 1}" + (f", sample {b + 1}" if several else ""): _drawn(_map(found, b, n, None))
        for b, n in places[:PICTURES]
    }


def _drawn(share: Tensor, under: Image | None = None) -> Image:
    from PIL import Image as Images

    rows, columns = share.shape
    size = under.size if under is not None else (columns * CELL, rows * CELL)
    plain = Images.new("RGB", size, (28, 28, 32)) if under is None else under.convert("RGB")
    alpha = Images.fromarray((share * (230 if under is not None else 255)).round().to(torch.uint8).numpy(), "L")
    red = Images.new("RGB", size, (235, 60, 40))
    return Images.composite(red, plain, alpha.resize(size, Images.Resampling.NEAREST))
