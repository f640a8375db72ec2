"""What one attention call of the recipe needs: why it runs dense, its layout, and the operators."""

from __future__ import annotations

import functools
import logging
from typing import NamedTuple

import torch
from torch import Tensor

from patchkit import kernels
from patchkit.context import AttentionCall
from patchkit.kernels.quantised import PV, QK
from patchkit.recipes.paro.geometry import Geometry
from patchkit.recipes.paro.plan import PermutePlan
from patchkit.recipes.paro.text_apart import attend_apart, image_layout

logger = logging.getLogger(__name__)


def obstacle(call: AttentionCall) -> str | None:
    """Why this call cannot be attended by a plan at all; None if it can."""
    if call.step is None:
        reason = "no step clock: nobody tells which denoising step this is (patch the pipeline, not the model)"
    elif call.causal:
        return "causal attention"
    elif torch.is_grad_enabled() and any(t.requires_grad for t in (call.q, call.k, call.v)):
        return "gradients are asked for: the order of tokens has none"
    else:
        return None
    warn_once(f"paro runs dense: {reason}")
    return reason


def lengths(call: AttentionCall) -> tuple[int, ...] | str | None:
    """Valid keys of each sample if some are padding, None if all are valid, or why the mask cannot be used."""
    if call.mask is None:
        return None
    valid = call.key_padding()
    if valid is None:
        return "mask is not key padding"
    valid = valid.expand(call.q.shape[0], -1)
    counts = valid.sum(-1)
    if not bool((valid == (torch.arange(valid.shape[1], device=valid.device) < counts[:, None])).all()):
        return "mask hides keys between others"
    found = tuple(int(n) for n in counts.tolist())
    return found if min(found) < valid.shape[1] else None


class Choice(NamedTuple):
    """Which heads of a row do what.

    Attributes:
        codes: order of each head; 0 where a head runs dense.
        keep: bool [H, n, n], kept image blocks.
        empty: bool [H], heads of which image queries see text only.
    """

    codes: tuple[int, ...]
    keep: Tensor
    empty: Tensor


def choice_of(
    plan: PermutePlan, row: int, bucket: int, heads: frozenset[int], dense_below: float, skip_empty: bool
) -> Choice:
    """Orders and masks of one row in a time bucket; heads that are not to be sparse keep everything."""
    number = plan.facts.masks[bucket]
    H = plan.order.shape[1]
    sparse = torch.tensor([h in heads for h in range(H)])
    sparse &= ~(plan.kept_mass[number, row] < dense_below)  # an unmeasured mass is NaN, which is not below
    keep = plan.mask(bucket, row) | ~sparse[:, None, None]
    codes = tuple(int(c) if s else 0 for c, s in zip(plan.order[row].tolist(), sparse.tolist(), strict=True))
    empty = plan.empty[row] & sparse if skip_empty else torch.zeros(H, dtype=torch.bool)
    return Choice(codes, keep, empty)


class Layouts(NamedTuple):
    """What a call computes: of the whole sequence, and of the image alone where text is attended apart."""

    whole: kernels.BlockLayout
    image: kernels.BlockLayout | None
    valid: tuple[int, ...] | None


def make_layouts(
    choice: Choice, geometry: Geometry, valid: tuple[int, ...] | None, device: torch.device, apart: bool
) -> Layouts:
    """The kept image blocks among all blocks: those that touch text and the ragged end are always computed."""
    heads, first, last = choice.keep.shape[0], geometry.first, geometry.last
    blocks = torch.ones(1, heads, geometry.total, geometry.total, dtype=torch.bool)
    blocks[0, :, first:last, first:last] = choice.keep & ~choice.empty[:, None, None]
    image = image_layout(blocks, geometry, valid, device) if apart and geometry.text else None
    made = kernels.BlockLayout.from_bool(
        blocks,
        block_q=geometry.block,
        block_k=geometry.block,
        q_len=geometry.tokens,
        kv_len=geometry.tokens,
        kv_lens=None if valid is None else torch.tensor(valid, dtype=torch.int32),
    )
    return Layouts(made.to(device), image, valid)


def attend(call: AttentionCall, codes: tuple[int, ...], geometry: Geometry, layouts: Layouts, qk: QK, pv: PV) -> Tensor:
    """Attention over the kept blocks in every head's own order, renormalised over what is kept."""
    q, k, v, layout = call.q, call.k, call.v, layouts.whole
    grid = geometry.grid.frames, geometry.grid.height, geometry.grid.width
    reorder = kernels.Reorder(codes, grid, geometry.start) if any(codes) else None
    if (qk != "none" or pv != "none") and layouts.image is None:
        return kernels.quantised_attention(q, k, v, layout, qk=qk, pv=pv, scale=call.scale, reorder=reorder)

    def kept(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layouts.image is not None:
            return attend_apart(q, k, v, geometry, layouts.image, layouts.valid, qk, pv, call.scale)
        return kernels.block_sparse_attention(q, k, v, layout, scale=call.scale)

    if reorder is None:
        return kept(q, k, v)
    if k.shape[1] == q.shape[1]:
        q, k, v = kernels.reorder_heads(q, k, v, codes=codes, grid=grid, start=geometry.start)
    else:  # orders are per query head, so every one of them needs keys of its own
        (q,) = kernels.reorder_heads(q, codes=codes, grid=grid, start=geometry.start)
        k, v = kernels.reorder_heads(k, v, codes=codes, grid=grid, start=geometry.start)
    return kernels.reorder_heads(kept(q, k, v), codes=codes, grid=grid, start=geometry.start, inverse=True)[0]


@functools.lru_cache(maxsize=64)
def warn_once(text: str) -> None:
    """Log the same sentence once, however many layers and steps have reason to."""
    logger.warning(text)
