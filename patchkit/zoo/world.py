"""The procedural shape world: coloured shapes that move on a coloured background.

It is the training set, the prompt set and the yardstick of every zoo model. A :class:`Scene` says what there is to
see, :func:`caption` says it in words and :func:`render` draws it, antialiased, straight from signed distances. The
drawing is vectorised over scenes, because the trainings draw their samples as they go and never store a data set.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SIZE = 64  # pixels, both ways
FRAMES = 17

# The middle of a path lies this far ahead of the middle of the picture. With paths symmetric about the middle neither
# the word "left" nor the frame's number says anything about the place, only their product does, and a small denoiser
# stays on that plateau for thousands of steps.
LEAD = 5.0

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.12, 0.14),
    "green": (0.13, 0.70, 0.24),
    "blue": (0.14, 0.28, 0.90),
    "yellow": (0.96, 0.86, 0.12),
    "purple": (0.62, 0.14, 0.78),
    "orange": (0.98, 0.54, 0.08),
}
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "white": (0.94, 0.94, 0.94),
    "gray": (0.48, 0.48, 0.48),
    "black": (0.06, 0.06, 0.06),
    "blue": (0.14, 0.28, 0.90),
}
SHAPES = ("circle", "square", "triangle")
MOTIONS = ("left", "right", "up", "down", "still")
_DIRECTION = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0), "still": (0.0, 0.0)}


@dataclass(frozen=True)
class Scene:
    """One object on a background. Pixel units; ``x`` and ``y`` are the middle of its path, ``travel`` its length."""

    shape: str
    colour: str
    background: str
    motion: str
    x: float = SIZE / 2
    y: float = SIZE / 2
    radius: float = 13.0
    travel: float = 20.0

    @property
    def caption(self) -> str:
        verb = "standing still" if self.motion == "still" else f"moving {self.motion}"
        return f"a {self.colour} {self.shape} {verb} on a {self.background} background"


def combinations() -> list[tuple[str, str, str, str]]:
    """Every (shape, colour, background, motion) that can be seen: an object never has the background's colour."""
    return [(s, c, b, m) for s in SHAPES for c in COLOURS for b in BACKGROUNDS if b != c for m in MOTIONS]


def sample_scene(rng: random.Random, combination: tuple[str, str, str, str] | None = None) -> Scene:
    """A scene with its free parameters (place, size, length of the path) drawn from ``rng``."""
    shape, colour, background, motion = combination or rng.choice(combinations())
    dx, dy = _DIRECTION[motion]
    x, y = SIZE / 2 + LEAD * dx, SIZE / 2 + LEAD * dy
    across, along = 5.0, 1.0  # how far the path may lie to the side, and be shifted along itself
    return Scene(
        shape,
        colour,
        background,
        motion,
        x=x + rng.uniform(-1, 1) * (along if dx else across),
        y=y + rng.uniform(-1, 1) * (along if dy else across),
        radius=rng.uniform(12.0, 14.0),
        travel=rng.uniform(19.0, 21.0),
    )


def distance(shape: str, dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    """Signed distance in pixels to the outline (negative inside); the three shapes cover about the same area."""
    if shape == "circle":
        return torch.hypot(dx, dy) - radius
    if shape == "square":
        return torch.maximum(dx.abs(), dy.abs()) - 0.89 * radius
    inner = 0.72 * radius  # triangle, tip up: inner radius; its centroid is the origin
    slanted = 0.8660254 * dx.abs() - 0.5 * dy
    return torch.maximum(slanted, dy) - inner


def render(scenes: Sequence[Scene], times: Tensor) -> Tensor:
    """Draw ``scenes`` at ``times``.

    Args:
        scenes: B scenes.
        times: (F,) moments in [0, 1]; 0 is the first frame of a clip, 1 the last.

    Returns:
        (B, F, 3, 64, 64) fp32 RGB in [0, 1].
    """
    times = times.to(torch.float32)
    axis = torch.arange(SIZE, dtype=torch.float32) + 0.5
    phase = times - 0.5
    out = torch.empty(len(scenes), len(times), 3, SIZE, SIZE)
    for name in SHAPES:
        index = [i for i, s in enumerate(scenes) if s.shape == name]
        if not index:
            continue
        group = [scenes[i] for i in index]
        column = lambda values: torch.tensor(list(values)).view(-1, 1)  # noqa: E731
        travel = column(s.travel for s in group)
        cx = column(s.x for s in group) + column(_DIRECTION[s.motion][0] for s in group) * travel * phase
        cy = column(s.y for s in group) + column(_DIRECTION[s.motion][1] for s in group) * travel * phase
        radius = column(s.radius for s in group)[..., None, None]
        dx = axis.view(1, 1, 1, -1) - cx[..., None, None]
        dy = axis.view(1, 1, -1, 1) - cy[..., None, None]
        cover = (0.5 - distance(name, dx, dy, radius)).clamp(0, 1).unsqueeze(2)
        front = torch.tensor([COLOURS[s.colour] for s in group]).view(-1, 1, 3, 1, 1)
        back = torch.tensor([BACKGROUNDS[s.background] for s in group]).view(-1, 1, 3, 1, 1)
        out[index] = back + cover * (front - back)
    return out
