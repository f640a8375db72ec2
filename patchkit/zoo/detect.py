"""Reads a clip of the shape world back from its pixels: background, colour, shape and motion.

Nothing here is learned, so a good score means that the picture is right, not that a network liked it. A detector that
always answers something would flatter bad pictures. Each attribute is therefore ``"none"`` unless the evidence is
clear: colours must be near the palette, outlines must fit a template, a path must be straight and along one axis.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from patchkit.media import as_tensor
from patchkit.zoo import world
from patchkit.zoo.world import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, Scene

NONE = "none"
ATTRIBUTES = ("background", "colour", "shape", "motion")

COLOUR_TOLERANCE = 0.27  # RGB distance to a palette entry; two entries are at least 0.33 apart
MIN_IOU = 0.84  # a circle and a square of equal area overlap by 0.83: below that the outline is neither
MIN_AREA, MAX_AREA = 0.02, 0.30  # of the picture; the world's objects cover 0.06 to 0.13
MIN_PRESENT = 0.8  # share of the frames in which the object must be seen
STILL_TRAVEL, MOVE_TRAVEL = 0.08, 0.15  # of the picture's width over the whole clip; in between is undecided


@dataclass(frozen=True)
class Attributes:
    """What is (or, from a prompt, what should be) seen. ``"none"`` means that nothing clear was found."""

    background: str = NONE
    colour: str = NONE
    shape: str = NONE
    motion: str = NONE

    @classmethod
    def of_scene(cls, scene: Scene) -> Attributes:
        return cls(scene.background, scene.colour, scene.shape, scene.motion)

    @classmethod
    def of_prompt(cls, prompt: str) -> Attributes:
        """Parse a caption of the world's grammar; raises ``ValueError`` naming the grammar for any other text."""
        match = _GRAMMAR.fullmatch(" ".join(prompt.lower().split()).rstrip("."))
        if match is None:
            raise ValueError(
                f"not a caption of the shape world: {prompt!r}; expected "
                "'a <colour> <shape> moving <left|right|up|down> on a <background> background' "
                "or '... standing still on a <background> background'"
            )
        colour, shape, motion, background = match.groups()
        return cls(background, colour, shape, motion or "still")


_GRAMMAR = re.compile(
    rf"an? ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) "
    rf"(?:standing still|moving ({'|'.join(m for m in MOTIONS if m != 'still')})) "
    rf"on an? ({'|'.join(BACKGROUNDS)}) background"
)


@dataclass(frozen=True)
class Detection(Attributes):
    """What was read, with the evidence behind it.

    Attributes:
        confidence: per attribute, from 0 (guess or nothing) to 1 (as in a clean render).
        iou: mean soft IoU over the frames of the best template.
        travel: (x, y) displacement over the clip by the fitted line, as a share of the picture's width.
        present: share of the frames in which the object was found.
    """

    confidence: dict[str, float] | None = None
    iou: float = 0.0
    travel: tuple[float, float] = (0.0, 0.0)
    present: float = 0.0

    def right(self, wanted: Attributes) -> dict[str, bool]:
        """Per attribute: was it read as ``wanted``?"""
        return {name: getattr(self, name) == getattr(wanted, name) != NONE for name in ATTRIBUTES}


def detect(video: Any) -> Detection:
    """Read background, colour, shape and motion from a clip.

    Args:
        video: one clip: (F, 3, H, W) in [0, 1], (F, H, W, 3) array, or a list of PIL images; square pictures.
    """
    clip = as_tensor(video).float()
    ring = _ring(clip)
    back = ring.median(dim=0).values
    background, back_confidence = _nearest(back, BACKGROUNDS)
    if (ring - back).norm(dim=-1).lt(COLOUR_TOLERANCE).float().mean() < 0.8:  # no even background: noise, texture
        return Detection(confidence=dict.fromkeys(ATTRIBUTES, 0.0))
    mask = _object_mask(clip, back)
    area = mask.flatten(1).float().mean(dim=1)
    seen = (area >= MIN_AREA) & (area <= MAX_AREA)
    present = seen.float().mean().item()
    if present < MIN_PRESENT:
        confidence = dict.fromkeys(ATTRIBUTES, 0.0) | {"background": back_confidence}
        return Detection(background=background, confidence=confidence, present=present)
    clip, mask = clip[seen], mask[seen]
    inside = _inner_colour(clip, mask)
    colour, colour_confidence = _nearest(inside, {k: v for k, v in COLOURS.items() if k != background})
    cover = _cover(clip, mask, back, inside)
    shape, shape_confidence, iou = _shape(cover)
    motion, motion_confidence, travel = _motion(cover, seen.nonzero().flatten(), len(seen))
    confidence = dict(
        zip(ATTRIBUTES, (back_confidence, colour_confidence, shape_confidence, motion_confidence), strict=True)
    )
    return Detection(background, colour, shape, motion, confidence, iou, travel, present)


def score(video: Any, wanted: Scene | Attributes | str) -> dict[str, bool]:
    """Per attribute and for ``"all"`` of them: does ``video`` show what the scene, attributes or prompt ask for?"""
    if isinstance(wanted, str):
        wanted = Attributes.of_prompt(wanted)
    elif isinstance(wanted, Scene):
        wanted = Attributes.of_scene(wanted)
    right = detect(video).right(wanted)
    return right | {"all": all(right.values())}


def _ring(clip: Tensor, width: int = 3) -> Tensor:
    """(n, 3) pixels of the frames' borders, where the world never puts an object's middle."""
    edge = torch.ones(clip.shape[-2:], dtype=torch.bool)
    edge[width:-width, width:-width] = False
    return clip.permute(0, 2, 3, 1)[:, edge].reshape(-1, 3)


def _nearest(rgb: Tensor, palette: dict[str, tuple[float, float, float]]) -> tuple[str, float]:
    distances = {name: (rgb - torch.tensor(value)).norm().item() for name, value in palette.items()}
    name = min(distances, key=lambda k: distances[k])
    if distances[name] > COLOUR_TOLERANCE:
        return NONE, 0.0
    return name, 1.0 - distances[name] / COLOUR_TOLERANCE


def _object_mask(clip: Tensor, back: Tensor) -> Tensor:
    """(F, H, W): the largest connected region that is far from the background's colour, in each frame."""
    smooth = F.avg_pool2d(F.pad(clip, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    far = (smooth - back.view(3, 1, 1)).norm(dim=1)
    strong = torch.quantile(far.flatten(), 0.97)  # an object covers 6 % and more, so this is its colour's distance
    return _largest_component(far > (0.5 * strong).clamp_min(0.12))


def _largest_component(mask: Tensor) -> Tensor:
    """Keep the largest 4-connected region of each (H, W) plane by flooding labels."""
    frames, height, width = mask.shape
    labels = torch.arange(1, height * width + 1, dtype=torch.float32).view(1, height, width) * mask
    while True:
        across = F.max_pool2d(labels[:, None], (1, 3), stride=1, padding=(0, 1))
        down = F.max_pool2d(labels[:, None], (3, 1), stride=1, padding=(1, 0))
        flooded = torch.maximum(across, down)[:, 0] * mask
        if torch.equal(flooded, labels):
            break
        labels = flooded
    index = labels.long().flatten(1)
    counts = torch.zeros(frames, height * width + 1).scatter_add_(1, index, torch.ones(index.shape))
    counts[:, 0] = 0
    return mask & (labels.long() == counts.argmax(dim=1).view(-1, 1, 1))


def _inner_colour(clip: Tensor, mask: Tensor) -> Tensor:
    """Median colour of the object away from its outline."""
    inner = -F.max_pool2d(-mask[:, None].float(), 5, stride=1, padding=2)[:, 0] > 0.5
    if inner.sum() < len(clip) * 4:
        inner = mask
    return clip.permute(0, 2, 3, 1)[inner].median(dim=0).values


def _cover(clip: Tensor, mask: Tensor, back: Tensor, front: Tensor) -> Tensor:
    """(F, H, W) in [0, 1]: how much of each pixel the object covers; 0 away from the object."""
    axis = front - back
    cover = ((clip - back.view(3, 1, 1)) * axis.view(3, 1, 1)).sum(dim=1) / axis.square().sum().clamp_min(1e-4)
    near = F.max_pool2d(mask[:, None].float(), 5, stride=1, padding=2)[:, 0]
    return cover.clamp(0, 1) * near


def _centroids(cover: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per frame: x and y of the middle, and the area, in pixels."""
    area = cover.sum(dim=(1, 2)).clamp_min(1e-6)
    x = (cover.sum(dim=1) * (torch.arange(cover.shape[2]) + 0.5)).sum(dim=1) / area
    y = (cover.sum(dim=2) * (torch.arange(cover.shape[1]) + 0.5)).sum(dim=1) / area
    return x, y, area


_UNIT_AREA = {"circle": 3.141593, "square": 4 * 0.89**2, "triangle": 5.196152 * 0.72**2}


def _shape(cover: Tensor) -> tuple[str, float, float]:
    """The template of the object's own area that fits best after a small search over place and size."""
    x, y, area = _centroids(cover)
    axis_x = torch.arange(cover.shape[2]) + 0.5
    axis_y = torch.arange(cover.shape[1]) + 0.5
    best: dict[str, float] = {}
    for name in SHAPES:
        radius = (area / _UNIT_AREA[name]).sqrt()
        fits = []
        for grow in (0.94, 1.0, 1.06):
            for ox, oy in ((0.0, 0.0), (-0.7, 0.0), (0.7, 0.0), (0.0, -0.7), (0.0, 0.7)):
                dx = axis_x.view(1, 1, -1) - (x + ox).view(-1, 1, 1)
                dy = axis_y.view(1, -1, 1) - (y + oy).view(-1, 1, 1)
                template = (0.5 - world.distance(name, dx, dy, (grow * radius).view(-1, 1, 1))).clamp(0, 1)
                both = torch.minimum(template, cover).sum(dim=(1, 2))
                fits.append(both / (template.sum(dim=(1, 2)) + area - both))  # soft IoU
        best[name] = torch.stack(fits).max(dim=0).values.mean().item()
    first, second = sorted(best, key=lambda k: -best[k])[:2]
    if best[first] < MIN_IOU:
        return NONE, 0.0, best[first]
    return first, min(1.0, (best[first] - best[second]) / 0.1), best[first]


def _motion(cover: Tensor, index: Tensor, frames: int) -> tuple[str, float, tuple[float, float]]:
    """Direction of the straight line through the object's middles; a crooked or slanted path is no motion."""
    if frames < 2:
        return NONE, 0.0, (0.0, 0.0)
    x, y, _ = _centroids(cover)
    time = index.float() / (frames - 1)
    time = time - time.mean()
    slopes, misses = [], []
    for place, extent in ((x, cover.shape[2]), (y, cover.shape[1])):
        share = place / extent
        slope = (time * (share - share.mean())).sum() / time.square().sum().clamp_min(1e-9)
        slopes.append(slope.item())
        misses.append((share - share.mean() - slope * time).square().mean().sqrt().item())
    dx, dy = slopes
    travel = max(abs(dx), abs(dy))
    if max(misses) > 0.05:
        return NONE, 0.0, (dx, dy)
    if travel < STILL_TRAVEL:
        return "still", 1.0 - travel / STILL_TRAVEL, (dx, dy)
    if travel < MOVE_TRAVEL or min(abs(dx), abs(dy)) > 0.5 * travel:
        return NONE, 0.0, (dx, dy)
    name = ("right" if dx > 0 else "left") if abs(dx) > abs(dy) else ("down" if dy > 0 else "up")
    return name, min(1.0, travel / 0.4), (dx, dy)
