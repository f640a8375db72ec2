"""Block masses to select from, and the layouts that follow from them: what searches find, and the hardest case."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import value_error
from ..layout import BlockLayout, ElementRule
from .shapes import Shape

PATTERNS = ("random", "video")
# How fast the mass of a block falls: with the distance inside a frame, and with the distance in frames.
NEAR, FRAMES = 12.0, 6.0


def masses(shape: Shape, block: int, pattern: str, device: torch.device, seed: int = 0) -> Tensor:
    """(1, H, Nq, Nk) fp32 block masses, different in every head.

    ``random``: no structure, so neighbouring rows share no keys and the memory system is asked the most. ``video``: as
    maps of video models look (Sparse VideoGen, arXiv 2502.01776): even heads look around them in their own and near
    frames, odd heads at the same place in all frames, which are stripes at a frame's distance. A single frame, or text
    of a language model, leaves locality, and the odd heads look at the first block as well.

    Raises:
        KernelValueError: an unknown pattern.
    """
    generator = torch.Generator(device).manual_seed(seed)
    n = -(-shape.length // block)
    noise = torch.rand(1, shape.heads, n, n, generator=generator, device=device)
    if pattern == "random":
        return noise
    if pattern != "video":
        raise value_error(f"there is no pattern {pattern!r}", "masses", f"Use one of {', '.join(PATTERNS)}.")
    frame = shape.frame or shape.length
    token = torch.arange(n, device=device) * block
    place, number = (token % frame).float() / frame, (token // frame).float() * frame / shape.length
    inside = (place[:, None] - place).abs()
    across = (number[:, None] - number).abs()
    spatial = torch.exp(-NEAR * (inside + FRAMES * across))
    temporal = torch.exp(-NEAR * FRAMES * inside - across)
    if shape.frame is None:
        temporal = spatial.clone()
        temporal[:, 0] = 1.0
    noise += 0.3
    noise[:, 0::2] *= spatial
    noise[:, 1::2] *= temporal
    return noise


def layout_of(shape: Shape, block: int, mass: Tensor, density: float) -> BlockLayout:
    """Each row keeps the ``density`` of its blocks that are heaviest; blocks with text come on top, the diagonal too.

    Args:
        shape: the call.
        block: tokens of a block, of queries and keys alike.
        mass: (1, H, Nq, Nk) from :func:`masses`, or from ``block_mass``.
        density: share of the blocks without text, of a causal call of the blocks up to the diagonal.
    """
    n = mass.shape[-1]
    sizes: dict[str, Any] = {"block_q": block, "block_k": block, "q_len": shape.length, "kv_len": shape.length}
    if shape.causal:
        return _causal(mass, density, sizes)
    video = shape.tokens // block if shape.text else n
    k = min(video, max(1, round(density * video)))
    forced = None
    if shape.text:
        forced = torch.zeros(1, 1, n, n, dtype=torch.bool, device=mass.device)
        forced[..., video:, :] = forced[..., video:] = True
    return BlockLayout.from_topk(mass, k, forced, **sizes)


def _causal(mass: Tensor, density: float, sizes: dict[str, Any]) -> BlockLayout:
    """Row p keeps round(density * (p + 1)) of its p + 1 blocks; the diagonal block is one of them, and partial."""
    n = mass.shape[-1]
    row = torch.arange(n, device=mass.device)
    keep = torch.empty(mass.shape, dtype=torch.bool, device=mass.device)
    wanted = (density * (row + 1)).round().clamp(min=1).unsqueeze(-1)
    for h in range(mass.shape[1]):  # head by head: ranks of all heads at once would be the largest tensor here
        score = mass[0, h].masked_fill(row > row.unsqueeze(-1), float("-inf"))
        score.fill_diagonal_(float("inf"))
        rank = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        keep[0, h] = (rank < wanted) & (row <= row.unsqueeze(-1))
    return BlockLayout.from_bool(keep, rule=ElementRule(causal_offset=0), **sizes)


def density_of(shape: Shape, layout: BlockLayout) -> float:
    """Share of the blocks that the dense call computes: all of them, or those up to the diagonal."""
    n = layout.n_q
    blocks = n * (n + 1) // 2 if shape.causal else n * layout.n_k
    return float(layout.listed.sum(dtype=torch.int64)) / (layout.listed[..., 0].numel() * blocks)
