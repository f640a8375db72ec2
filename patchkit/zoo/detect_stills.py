"""Reads a still of the shape world back from its pixels: background, objects, their colours, shapes and places.

Like :mod:`patchkit.zoo.detect`, nothing here is learned, and whatever is not clear is ``"none"``: a picture that is
neither background nor objects to a good part has no objects at all, outlines must fit a template, and a relation must
be along one axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from patchkit.media import as_tensor
from patchkit.zoo.detect import (
    COLOUR_TOLERANCE,
    MAX_AREA,
    MIN_AREA,
    NONE,
    _cover,
    _inner_colour,
    _largest_component,
    _nearest,
    _ring,
    _shape,
)
from patchkit.zoo.stills import PLACES, RELATIONS, Description, Still
from patchkit.zoo.world import BACKGROUNDS, COLOURS

ATTRIBUTES = ("background", "count", "colour", "shape", "position")
EXPLAINED = 0.85  # share of the pixels that must have the background's or an object's colour
MOST_OBJECTS = 5  # more than are ever asked for, so that too many are seen to be too many
CENTRE, SIDE, APART = 0.09, 0.13, 0.25  # of the picture's width: reach of the centre, least shift, least distance


@dataclass(frozen=True)
class Found:
    """An object. ``x``, ``y`` (middle of its bounding box) and ``area`` (its cover) are shares of the picture."""

    colour: str
    shape: str
    x: float
    y: float
    area: float
    iou: float
    mask: Tensor

    @property
    def place(self) -> str:
        """Where it is, as one of ``PLACES`` or ``"none"``."""
        return direction(self.x - 0.5, self.y - 0.5, PLACES, SIDE)

    def relation(self, other: Found) -> str:
        """Where it is relative to ``other``, as one of ``RELATIONS`` or ``"none"``."""
        return direction(self.x - other.x, self.y - other.y, RELATIONS, APART)


@dataclass(frozen=True)
class Reading:
    """What a picture shows: the background's name (or ``"none"``) and the objects, largest first."""

    background: str = NONE
    objects: tuple[Found, ...] = ()

    def match(self, wanted: Description) -> tuple[Found | None, ...]:
        """For each wanted item the object that stands for it: the assignment with the most right words."""
        spare: tuple[Found | None, ...] = (*self.objects, *(None for _ in wanted.items))
        return max(permutations(spare, len(wanted.items)), key=lambda chosen: _agreement(chosen, wanted))

    def right(self, wanted: Description) -> dict[str, bool]:
        """Per attribute: as wanted? Attributes that ``wanted`` does not speak of are left out.

        ``colour`` and ``shape`` are right when they are for every item.
        """
        out = {"background": self.background == wanted.background, "count": len(self.objects) == len(wanted.items)}
        chosen = self.match(wanted)
        pairs = list(zip(chosen, wanted.items, strict=True))
        if pairs:
            out["colour"] = all(o is not None and o.colour == item.colour for o, item in pairs)
            out["shape"] = all(o is not None and o.shape == item.shape for o, item in pairs)
        if wanted.position is not None:
            out["position"] = _position(chosen) == wanted.position
        return out


def detect(picture: Any) -> Reading:
    """Read one picture.

    Args:
        picture: (3, H, W) in [0, 1], (H, W, 3) array, or a PIL image; square.
    """
    image = as_tensor(picture)[:1]
    ring = _ring(image)
    back = ring.median(dim=0).values
    if (ring - back).norm(dim=-1).lt(COLOUR_TOLERANCE).float().mean() < 0.8:  # no even background: noise, texture
        return Reading()
    background, _ = _nearest(back, BACKGROUNDS)
    names, nearest = _by_colour(image, back, background)
    if (nearest >= 0).float().mean() < EXPLAINED:
        return Reading(background)
    cores = _cores(nearest, len(names))
    found = [_object(image, back, background, core, cores) for core in cores]
    return Reading(background, tuple(sorted(found, key=lambda o: -o.area)))


def score(picture: Any, wanted: Still | Description | str) -> dict[str, bool]:
    """Per attribute and for ``"all"`` of them: does ``picture`` show what is wanted?"""
    if isinstance(wanted, str):
        wanted = Description.parse(wanted)
    elif isinstance(wanted, Still):
        wanted = wanted.description
    right = detect(picture).right(wanted)
    return right | {"all": all(right.values())}


def direction(dx: float, dy: float, names: dict[str, tuple[int, int]], least: float) -> str:
    """The name of the axis direction that (dx, dy) clearly has."""
    reach = max(abs(dx), abs(dy))
    if "center" in names and reach < CENTRE:
        return "center"
    if reach < least or min(abs(dx), abs(dy)) > 0.6 * reach:
        return NONE
    sign = (0 if abs(dx) < abs(dy) else 1 if dx > 0 else -1, 0 if abs(dx) > abs(dy) else 1 if dy > 0 else -1)
    return next(name for name, direction in names.items() if direction == sign)


def _position(chosen: tuple[Found | None, ...]) -> str:
    first = chosen[0]
    if first is None:
        return NONE
    if len(chosen) == 1:
        return first.place
    return NONE if chosen[1] is None else first.relation(chosen[1])


def _agreement(chosen: tuple[Found | None, ...], wanted: Description) -> tuple[int, bool, int]:
    words = [
        (o.colour == item.colour) + (o.shape == item.shape)
        for o, item in zip(chosen, wanted.items, strict=True)
        if o is not None
    ]
    return sum(words), wanted.position is not None and _position(chosen) == wanted.position, len(words)


def _by_colour(image: Tensor, back: Tensor, background: str) -> tuple[list[str], Tensor]:
    """Names of the colours, and for each pixel which is near: 0 the background, 1 and up the names, -1 none."""
    names = [name for name in COLOURS if name != background]
    palette = torch.stack([back, *(torch.tensor(COLOURS[name]) for name in names)])
    smooth = F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, stride=1)[0]
    distances = (smooth[None] - palette[:, :, None, None]).norm(dim=1)
    least, index = distances.min(dim=0)
    return names, index.where(least < COLOUR_TOLERANCE, torch.tensor(-1))


def _cores(nearest: Tensor, colours: int) -> list[Tensor]:
    """The connected regions of one colour that are large enough to be an object."""
    cores: list[Tensor] = []
    for number in range(1, colours + 1):
        rest = (nearest == number)[None]
        while rest.float().mean() >= MIN_AREA and len(cores) < MOST_OBJECTS:
            core = _largest_component(rest)
            if core.float().mean() < MIN_AREA:
                break
            cores.append(core)
            rest = rest & ~core
    return cores


def _grow(mask: Tensor, by: int) -> Tensor:
    return F.max_pool2d(mask[:, None].float(), 2 * by + 1, stride=1, padding=by)[:, 0] > 0.5


def _object(image: Tensor, back: Tensor, background: str, core: Tensor, cores: list[Tensor]) -> Found:
    inside = _inner_colour(image, core)
    colour, _ = _nearest(inside, {k: v for k, v in COLOURS.items() if k != background})
    cover = _cover(image, core, back, inside)
    for other in cores:
        if other is not core:  # what belongs to a neighbour is not this object's outline
            cover = cover.masked_fill(_grow(other, 1) & ~core, 0.0)
    area = cover.mean().item()
    shape, _, iou = _shape(cover) if area <= MAX_AREA else (NONE, 0.0, 0.0)
    mask = cover[0] > 0.5
    rows, columns = mask.any(dim=1).nonzero().flatten(), mask.any(dim=0).nonzero().flatten()
    if not len(rows):
        return Found(colour, NONE, 0.5, 0.5, area, 0.0, mask)
    x = (columns[0] + columns[-1] + 1).item() / 2 / mask.shape[1]
    y = (rows[0] + rows[-1] + 1).item() / 2 / mask.shape[0]
    return Found(colour, shape, x, y, area, iou, mask)
