"""Rounded attention that leaves text alone: image blocks among themselves are rounded, all that touches text is not.

The authors' simulation rounds the image part only (PAROAttention, arXiv 2506.16054). Image queries attend to image keys
and to text keys apart; the two are joined by their row sums, which is exact. Text queries attend to everything dense.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchkit import kernels
from patchkit.kernels.quantised import PV, QK
from patchkit.recipes.paro.geometry import Geometry


def image_tokens(geometry: Geometry) -> slice:
    """The tokens outside the blocks that touch text: whole blocks, and the ragged end where text stands first."""
    if geometry.text_first:
        return slice(geometry.first * geometry.block, geometry.tokens)
    return slice(0, geometry.last * geometry.block) if geometry.text else slice(0, geometry.tokens)


def image_layout(
    blocks: Tensor, geometry: Geometry, valid: tuple[int, ...] | None, device: torch.device
) -> kernels.BlockLayout:
    """Of the kept blocks of a whole sequence, bool (1, H, n, n), those of :func:`image_tokens`."""
    here = image_tokens(geometry)
    count = here.stop - here.start
    first, last = here.start // geometry.block, -(-here.stop // geometry.block)
    lens = None if valid is None else [min(max(n - here.start, 0), count) for n in valid]
    made = kernels.BlockLayout.from_bool(
        blocks[:, :, first:last, first:last],
        block_q=geometry.block,
        block_k=geometry.block,
        q_len=count,
        kv_len=count,
        kv_lens=None if lens is None or min(lens) == count else torch.tensor(lens, dtype=torch.int32),
    )
    return made.to(device)


def attend_apart(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    geometry: Geometry,
    image: kernels.BlockLayout,
    valid: tuple[int, ...] | None,
    qk: QK,
    pv: PV,
    scale: float | None,
) -> Tensor:
    """Attention of (B, H, N, D) tensors whose tokens are already in each head's order; ``image`` says what is kept."""
    here, tokens = image_tokens(geometry), geometry.tokens
    text = slice(0, here.start) if geometry.text_first else slice(here.stop, tokens)
    mask = None
    if valid is not None:
        mask = torch.arange(tokens, device=q.device) < torch.tensor(valid, device=q.device)[:, None]
        mask = mask[:, None, None]
    options: dict[str, Any] = {"scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    mine, lse = kernels.quantised_attention(
        q[:, :, here], k[:, :, here], v[:, :, here], image, qk=qk, pv=pv, scale=scale, return_lse=True
    )
    beside, rest = kernels.dense_attention(
        q[:, :, here],
        k[:, :, text],
        v[:, :, text],
        mask=None if mask is None else mask[..., text],
        return_lse=True,
        **options,
    )
    joined, _ = kernels.merge_states(mine, lse, beside, rest)
    dense = kernels.dense_attention(q[:, :, text], k, v, mask=mask, **options)
    return torch.cat([dense, joined] if geometry.text_first else [joined, dense], 2)
