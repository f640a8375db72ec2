"""How smooth a video is in time.

Two figures, because they fail differently. *Smoothness* compares each frame with the next by simple features (colours
and outlines, coarsely placed): it falls when things jump, vanish or change colour. *Flicker* looks at places where
nothing passes by, and tells how much their brightness trembles there.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

CELLS = 8  # places, both ways, at which colours are compared
COARSE, DIRECTIONS = 4, 8  # places and directions of gradients


def frame_features(clip: Tensor) -> tuple[Tensor, Tensor]:
    """Colours and outlines of each frame.

    Args:
        clip: (F, 3, H, W) in [0, 1].

    Returns:
        (F, 192) mean colours of 8x8 places, with middle gray as zero; (F, 128) histograms of the directions of the
        brightness gradient in 4x4 places, weighted by its length. Rows have length 1, or 0 where there is nothing.
    """
    colours = F.adaptive_avg_pool2d(clip - 0.5, CELLS).flatten(1)
    gray = clip.mean(dim=1)
    dx = gray[:, 1:-1, 2:] - gray[:, 1:-1, :-2]
    dy = gray[:, 2:, 1:-1] - gray[:, :-2, 1:-1]
    turn = torch.atan2(dy, dx) / (2 * math.pi) * DIRECTIONS
    lower = turn.floor()
    part = turn - lower  # shared between the two nearest directions, so that a small turn is a small change
    bins = torch.arange(DIRECTIONS).view(1, -1, 1, 1)
    index = lower.long()[:, None]
    weight = (index % DIRECTIONS == bins) * (1 - part)[:, None] + ((index + 1) % DIRECTIONS == bins) * part[:, None]
    outlines = F.adaptive_avg_pool2d(weight * torch.hypot(dx, dy)[:, None], COARSE).flatten(1)
    return _unit(colours), _unit(outlines)


def _unit(rows: Tensor) -> Tensor:
    length = rows.norm(dim=1, keepdim=True)
    return torch.where(length > 1e-6, rows / length.clamp_min(1e-6), torch.zeros_like(rows))


def adjacent(features: Tensor) -> Tensor:
    """(F - 1,) cosines of each row and the next; two rows of nothing are alike, nothing and something are not."""
    empty = features.norm(dim=1) == 0
    cosine = F.cosine_similarity(features[1:], features[:-1], dim=1)
    return torch.where(empty[1:] & empty[:-1], torch.ones(()), cosine)


def smoothness(clip: Tensor) -> Tensor:
    """(F - 1,) how alike each frame and the next are, at most 1: mean of the cosines of colours and of outlines."""
    colours, outlines = frame_features(clip)
    return (adjacent(colours) + adjacent(outlines)) / 2


def flicker(clip: Tensor) -> float:
    """Trembling of what stands still, in levels of 255; 0 for a still video, next to 0 where flat things pass.

    For every pixel the *median* over time of the absolute second difference |x(t-1) - 2 x(t) + x(t+1)|, averaged over
    pixels and channels. Something that passes a pixel changes it in a few frames, which a median leaves out, so no
    mask of what moves is needed; trembling changes it in most frames. Steady fading has no second difference. What a
    median cannot see is a single flash: the least :func:`smoothness` shows that.
    """
    bend = (clip[:-2] - 2 * clip[1:-1] + clip[2:]).abs()
    return float(bend.flatten(1).median(dim=0).values.mean()) * 255


def figures(clip: Tensor) -> dict[str, float]:
    """All of them, for a video of three frames and more."""
    if len(clip) < 3:
        return {}
    alike = smoothness(clip)
    return {"smoothness": float(alike.mean()), "smoothness_worst": float(alike.min()), "flicker": flicker(clip)}


def cscv(features: Tensor) -> float:
    """How evenly a video changes: 1 / (1 + 10 CV), CV the deviation of the frames' likeness over its mean; at most 1.

    Coefficient of variation of frames' likeness of DiTCtrl (arXiv 2412.18597), whose features are CLIP's. A video that
    stands still has 1, so a figure of what it shows belongs beside it.

    Args:
        features: (F, n), one row a frame, F at least 2; CLIP's by :func:`patchkit.evaluation.learned.clip_frames`.
    """
    likeness = F.cosine_similarity(features[1:].double(), features[:-1].double(), dim=1)
    variation = float(likeness.std(correction=0) / likeness.mean())
    return 1 / (1 + 10 * variation)
