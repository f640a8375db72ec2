"""Still pictures of the shape world: no, one or two coloured shapes on a background, with words for where they are.

It shares shapes, colours and backgrounds with the clips of :mod:`patchkit.zoo.world` and is the training set, the
prompt set and the yardstick of ``zoo/image``. A :class:`Description` is what a caption says, :func:`draw` chooses what
the caption leaves open, and :func:`render` draws the picture.

Every picture has a fine, soft grain. Perfectly flat pictures would span so few dimensions that their inversion to
noise is degenerate: directions in which pictures never differ stay without noise. The grain is white at the resolution
of the latents, so an inverted picture is nearly Gaussian noise, as it is for photographs.
"""

from __future__ import annotations

import math
import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from patchkit.zoo.world import BACKGROUNDS, COLOURS, SHAPES, SIZE, distance

CELL = 4  # pixels a latent, both ways
GRAIN = 0.035  # standard deviation of the 4x4 means of the grain, of the range of a colour channel

PLACES = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "center": (0, 0)}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

# Never drawn in training, one for each shape, so that what the model makes of new combinations can be measured.
HELD_OUT_ITEMS = frozenset({("green", "circle"), ("purple", "square"), ("orange", "triangle")})
HELD_OUT_EVERY = 10  # besides, one in so many of the two-object scenes


@dataclass(frozen=True)
class Item:
    """A shape of a colour, as words."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{_article(self.colour)} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Description:
    """What a caption says.

    Attributes:
        background: one of ``BACKGROUNDS``.
        items: up to two, of different colours, neither of them the background's.
        position: for one item where it is (one of ``PLACES``), for two where the first is relative to the second (one
            of ``RELATIONS``); None where the caption does not say.
    """

    background: str
    items: tuple[Item, ...] = ()
    position: str | None = None

    @property
    def caption(self) -> str:
        if not self.items:
            return f"an empty {self.background} background"
        text = str(self.items[0])
        if len(self.items) == 2:
            text += f" {self.position or 'and'} {self.items[1]}"
        elif self.position is not None:
            text += f" {'in' if self.position == 'center' else 'at'} the {self.position}"
        return f"{text} on {_article(self.background)} {self.background} background"

    @property
    def reversed(self) -> Description:
        """The same scene told from the other object."""
        if len(self.items) < 2:
            return self
        return replace(self, items=self.items[::-1], position=OPPOSITE.get(self.position or ""))

    @property
    def held_out(self) -> str:
        """Why the training never sees it: ``"item"`` (a pair of colour and shape), ``"scene"``, or ``""``."""
        if any((item.colour, item.shape) in HELD_OUT_ITEMS for item in self.items):
            return "item"
        if len(self.items) < 2:
            return ""
        either = min(self.caption, self.reversed.caption)  # both ways to say it are held out together
        return "scene" if zlib.crc32(either.encode()) % HELD_OUT_EVERY == 0 else ""

    @classmethod
    def parse(cls, text: str) -> Description:
        """Read a caption; raises ``ValueError`` naming the grammar for any other text."""
        words = " ".join(text.lower().split()).rstrip(".")
        match = _GRAMMAR.fullmatch(words)
        if match is None:
            raise ValueError(f"not a caption of a still of the shape world: {text!r}; expected {_GRAMMAR_IN_WORDS}")
        found = match.groupdict()
        background = found["empty"] or found["background"]
        items = [Item(found[f"colour{n}"], found[f"shape{n}"]) for n in "12" if found[f"colour{n}"]]
        colours = [item.colour for item in items]
        if background in colours or len(set(colours)) < len(colours):
            raise ValueError(f"objects and background must differ in colour: {text!r}")
        return cls(background, tuple(items), found["place"] or found["relation"])


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _item_pattern(number: int) -> str:
    return rf"an? (?P<colour{number}>{'|'.join(COLOURS)}) (?P<shape{number}>{'|'.join(SHAPES)})"


_GRAMMAR = re.compile(
    rf"an? empty (?P<empty>{'|'.join(BACKGROUNDS)}) background|"
    rf"{_item_pattern(1)}(?: (?:at|in) the (?P<place>{'|'.join(PLACES)})"
    rf"| (?:and|(?P<relation>{'|'.join(RELATIONS)})) {_item_pattern(2)})?"
    rf" on an? (?P<background>{'|'.join(BACKGROUNDS)}) background"
)
_GRAMMAR_IN_WORDS = (
    "'a <colour> <shape> [at|in the <left|right|top|bottom|center>] on a <background> background', "
    "'a <colour> <shape> <left of|right of|above|below|and> a <colour> <shape> on a <background> background' "
    "or 'an empty <background> background'"
)


@cache
def descriptions(count: int) -> tuple[Description, ...]:
    """Everything that the grammar can say about ``count`` objects."""
    items = [Item(c, s) for c in COLOURS for s in SHAPES]
    if count == 0:
        return tuple(Description(b) for b in BACKGROUNDS)
    if count == 1:
        places = (None, *PLACES)
        return tuple(Description(b, (i,), p) for b in BACKGROUNDS for i in items for p in places if i.colour != b)
    return tuple(
        Description(b, (i, j), r)
        for b in BACKGROUNDS
        for i in items
        for j in items
        for r in (None, *RELATIONS)
        if len({i.colour, j.colour, b}) == 3
    )


@dataclass(frozen=True)
class Still:
    """One picture: a description, and what it leaves open.

    Attributes:
        spots: (x, y, radius) of each item in pixels; x and y are the middle of its bounding box.
        grain: seed of the grain.
        tints: the items' colours where they are not those of their names.
        lobes: the items' outlines where they are none of the named shapes: (number, depth, turn) of each one's lobes.
    """

    description: Description
    spots: tuple[tuple[float, float, float], ...]
    grain: int = 0
    tints: tuple[tuple[float, float, float], ...] = ()
    lobes: tuple[tuple[int, float, float], ...] = ()

    @property
    def paints(self) -> tuple[tuple[float, float, float], ...]:
        """Red, green and blue of each item."""
        return self.tints or tuple(COLOURS[item.colour] for item in self.description.items)


def sample_description(rng: random.Random, pairs: float = 0.6, held_out: Sequence[str] = ("",)) -> Description:
    """A random description: a share of ``pairs`` with two objects, 3 % with none, the others with one.

    Args:
        rng: the source of chance.
        pairs: share of the descriptions that have two objects.
        held_out: which values of :attr:`Description.held_out` may come.
    """
    kind = rng.random()
    count = 2 if kind < pairs else 0 if kind > 0.97 else 1
    count = max(count, min({"": 0, "item": 1, "scene": 2}[name] for name in held_out))
    while True:
        found = rng.choice(descriptions(count))
        if found.held_out in held_out:
            return found


def draw(description: Description, rng: random.Random) -> Still:
    """Choose places, sizes and grain."""

    def jitter(reach: float) -> float:
        return rng.uniform(-reach, reach)

    middle = SIZE / 2
    spots: list[tuple[float, float, float]] = []
    if len(description.items) == 1:
        if description.position is None:
            x, y = middle + jitter(15), middle + jitter(15)
        else:
            dx, dy = PLACES[description.position]
            across = 2.5 if description.position == "center" else 5.0
            x = middle + 14 * dx + jitter(2 if dx else across)
            y = middle + 14 * dy + jitter(2 if dy else across)
        spots = [(x, y, rng.uniform(11.0, 12.5))]
    elif description.items:
        dx, dy = RELATIONS[description.position or rng.choice(list(RELATIONS))]
        half, along, across = rng.uniform(15.25, 16.25), jitter(0.75), jitter(6)
        for side in (1, -1):
            lengthwise, sideways = along + side * half, across + jitter(1.5)
            x = middle + (dx * lengthwise if dx else sideways)
            y = middle + (dy * lengthwise if dy else sideways)
            spots.append((x, y, rng.uniform(10.4, 11.4)))
    return Still(description, tuple(spots), rng.getrandbits(48))


def tint(still: Still, rng: random.Random, apart: float = 0.35, away: float = 0.3) -> Still:
    """``still`` with its items in any colours.

    A model that learns shapes from these does not learn, instead, which colours a shape never has.

    Args:
        still: the picture.
        rng: the source of chance.
        apart: least distance from the background and from each other.
        away: least distance from the colour with which a shape is held out.
    """
    found = [BACKGROUNDS[still.description.background]]
    for item in still.description.items:
        avoided = [COLOURS[colour] for colour, shape in HELD_OUT_ITEMS if shape == item.shape]
        while True:
            new = (rng.uniform(0.04, 0.98), rng.uniform(0.04, 0.98), rng.uniform(0.04, 0.98))
            if min(math.dist(new, c) for c in found) > apart and min(math.dist(new, c) for c in avoided) > away:
                break
        found.append(new)
    return replace(still, tints=tuple(found[1:]))


def reshape(still: Still, rng: random.Random) -> Still:
    """``still`` with its items in outlines that have no name, and any of the named colours.

    A model that learns colours from these does not learn, instead, which colours a shape never has.
    """
    background = still.description.background
    colours = rng.sample([c for c in COLOURS if c != background], len(still.spots))
    items = tuple(replace(i, colour=c) for i, c in zip(still.description.items, colours, strict=True))
    lobes = tuple((rng.choice((2, 3, 4, 5)), rng.uniform(0.2, 0.45), rng.uniform(0, 2 * math.pi)) for _ in items)
    return replace(still, description=replace(still.description, items=items), lobes=lobes)


def _lobed(dx: Tensor, dy: Tensor, radius: Tensor, lobes: tuple[int, float, float]) -> Tensor:
    """About how many pixels (dx, dy) lies outside an outline of lobes, which touches ``radius`` at their tips."""
    number, depth, turn = lobes
    wave = (torch.atan2(dy, dx) * number + turn).cos()
    return (dx.square() + dy.square()).sqrt() - radius * (1 + depth * (wave - 1))


@cache
def _smoother() -> Tensor:
    """(64, 16): the smoothest rows (least second differences) whose means over four are given."""
    cells = SIZE // CELL
    means = torch.eye(cells, dtype=torch.float64).repeat_interleave(CELL, dim=1) / CELL
    bend = torch.diff(torch.eye(SIZE, dtype=torch.float64), n=2, dim=0)
    # minimise |bend u|^2 subject to means u = given, by Lagrange's conditions
    system = torch.zeros(SIZE + cells, SIZE + cells, dtype=torch.float64)
    system[:SIZE, :SIZE] = bend.T @ bend
    system[:SIZE, SIZE:], system[SIZE:, :SIZE] = means.T, means
    given = torch.zeros(SIZE + cells, cells, dtype=torch.float64)
    given[SIZE:] = torch.eye(cells, dtype=torch.float64)
    return torch.linalg.solve(system, given)[:SIZE].float()


def grain(seeds: Sequence[int]) -> Tensor:
    """(B, 3, 64, 64) soft grain whose 4x4 means are white noise of unit variance."""
    cells = SIZE // CELL
    noise = torch.stack([torch.randn(3, cells, cells, generator=torch.Generator().manual_seed(s)) for s in seeds])
    return _smoother() @ noise @ _smoother().T


def render(stills: Sequence[Still], strength: float = GRAIN) -> Tensor:
    """Draw ``stills``.

    Args:
        stills: B pictures.
        strength: of the grain; 0 draws flat colours.

    Returns:
        (B, 3, 64, 64) fp32 RGB in [0, 1].
    """
    axis = torch.arange(SIZE, dtype=torch.float32) + 0.5
    out = torch.tensor([BACKGROUNDS[s.description.background] for s in stills]).view(-1, 3, 1, 1)
    out = out.repeat(1, 1, SIZE, SIZE)
    for slot in (0, 1):
        for shape in SHAPES:
            here = [n for n, s in enumerate(stills) if len(s.spots) > slot and s.description.items[slot].shape == shape]
            if not here:
                continue
            x, y, radius = torch.tensor([stills[n].spots[slot] for n in here]).view(-1, 3, 1, 1).unbind(1)
            if shape == "triangle":  # its distance is told from the centroid, which lies below the box's middle
                y = y + 0.36 * radius
            outside = distance(shape, axis.view(1, 1, -1) - x, axis.view(1, -1, 1) - y, radius)
            for k, n in enumerate(here):
                if stills[n].lobes:
                    dx, dy = axis.view(1, -1) - x[k], axis.view(-1, 1) - stills[n].spots[slot][1]
                    outside[k] = _lobed(dx, dy, radius[k], stills[n].lobes[slot])
            cover = (0.5 - outside).clamp(0, 1)
            front = torch.tensor([stills[n].paints[slot] for n in here]).view(-1, 3, 1, 1)
            out[here] += cover.unsqueeze(1) * (front - out[here])
    if strength:
        out += strength * grain([s.grain for s in stills])
    return out.clamp_(0, 1)
