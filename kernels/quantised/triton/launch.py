"""Host side of the Triton kernels of quantised attention: the pass that rounds, then the one that attends."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...gpu import launching
from ...layout import BlockLayout
from ...reorder import address_table
from ...reorder.triton import reorder_triton
from ...sparse.triton.launch import work_order
from ..formats import LARGEST, LOG2E, P_ROWS, Format, Reorder, scale_of, top_of
from ..operands import Keys, extent_over, groups_of, mean_over
from .attend import attend_kernel
from .prepare import rows_kernel, values_kernel
from .table import padded, tile_of

PREPARE_WARPS = 4


class Rounded(NamedTuple):
    """Values as :func:`values_of_triton` returns them: (B, H, D_PAD, N') transposed, scale and mean (B, Hkv, D)."""

    v: Tensor
    scale: Tensor
    mean: Tensor | None


def quantised_triton(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, form: Format, scale: float, reorder: Reorder | None
) -> tuple[Tensor, Tensor]:
    """See :func:`patchkit.kernels.quantised_attention`; tensors are (B, H, N, D) views with contiguous D."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if not out.numel():
        return out, lse
    lens = layout.derived("kv_lens on the host", lambda: None if layout.kv_lens is None else layout.kv_lens.tolist())
    with launching(q.device):
        groups = groups_of(layout.block_q, layout.block_k)
        keys = None
        if form.qk != "none":
            keys = keys_of_triton(q, k, form, groups, scale, lens, layout.kv_lens, reorder)
        elif reorder is not None:
            order = (reorder.codes, reorder.grid, reorder.start, False)
            q, k = reorder_triton([q], *order)[0], reorder_triton([k], *order)[0]
        values = None
        if form.pv != "none":
            values = values_of_triton(v, form, groups[1], lens, layout.kv_lens, reorder, q.shape[1])
        elif reorder is not None:
            (v,) = reorder_triton([v], reorder.codes, reorder.grid, reorder.start, False)
        _attend(q, k, v, keys, values, out, lse, layout, form, scale, reorder)
    return out, lse


def keys_of_triton(
    q: Tensor,
    k: Tensor,
    form: Format,
    groups: tuple[int, int],
    scale: float,
    lens: list[int] | None,
    kv_lens: Tensor | None,
    reorder: Reorder | None,
) -> Keys:
    """Rounded queries and keys as :func:`patchkit.kernels.quantised.operands.keys_of` defines them.

    The head size is padded; with an order per query head, keys have one head for each of these.
    """
    mean = mean_over(k, lens) if form.smooths_k else None
    shift = None if mean is None else torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    heads = q.shape[1] if reorder is not None else k.shape[1]
    q8, q_scale = _rows(q, q.shape[1], mean, shift, None, groups[0], scale * LOG2E, scale, form, reorder)
    k8, k_scale = _rows(k, heads, mean, None, kv_lens, groups[1], 1.0, 1.0, form, reorder)
    return Keys(q8, q_scale, k8, k_scale, shift)


def _rows(
    x: Tensor,
    heads: int,
    mean: Tensor | None,
    shift: Tensor | None,
    lens: Tensor | None,
    group: int,
    factor: float,
    natural: float,
    form: Format,
    reorder: Reorder | None,
) -> tuple[Tensor, Tensor]:
    """Queries (with ``shift``: noted against the mean) or keys (smoothed by it)."""
    B, own, N, D = x.shape
    groups = -(-N // group)
    out = torch.empty(B, heads, groups * group, padded(D), dtype=torch.int8, device=x.device)
    scales = torch.empty(B, heads, groups, dtype=torch.float32, device=x.device)
    mean_heads = 1 if mean is None else mean.shape[1]
    rows_kernel[(groups * B * heads,)](
        *(x, mean, _table(reorder, x), lens, out, scales, shift, *x.stride()[:3]),
        *(heads, heads // own, mean_heads, heads // mean_heads, *_span(reorder), N, groups, factor, natural),
        LARGEST[form.qk],
        D=D,
        D_PAD=padded(D),
        GROUP=group,
        REORDER=reorder is not None,
        SMOOTH=mean is not None and shift is None,
        SHIFT=shift is not None,
        LENGTHS=lens is not None,
        num_warps=PREPARE_WARPS,
    )
    return out, scales


def values_of_triton(
    v: Tensor,
    form: Format,
    group: int,
    lens: list[int] | None,
    kv_lens: Tensor | None,
    reorder: Reorder | None,
    query_heads: int,
) -> Rounded:
    """Rounded values as :func:`patchkit.kernels.quantised.operands.values_of` defines them, transposed."""
    B, own, N, D = v.shape
    heads = query_heads if reorder is not None else own
    mean = mean_over(v, lens) if form.smooths_v else None
    scale = scale_of(extent_over(v, mean, lens), top_of(form.pv))
    length = -(-N // group) * group
    dtype = torch.float8_e4m3fn if form.pv == "fp8" else torch.int8
    out = torch.empty(B, heads, padded(D), length, dtype=dtype, device=v.device)
    values_kernel[(length // group * B * heads,)](
        *(v, mean, scale, _table(reorder, v), kv_lens, out, *v.stride()[:3]),
        *(heads, heads // own, own, *_span(reorder), N, length, top_of(form.pv)),
        D=D,
        D_PAD=padded(D),
        BN=group,
        REORDER=reorder is not None,
        SMOOTH=mean is not None,
        LENGTHS=kv_lens is not None,
        num_warps=PREPARE_WARPS,
    )
    return Rounded(out, scale, mean)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Keys | None,
    values: Rounded | None,
    out: Tensor,
    lse: Tensor,
    layout: BlockLayout,
    form: Format,
    scale: float,
    reorder: Reorder | None,
) -> None:
    B, H, _, D = out.shape
    tile = tile_of(D, q.element_size(), layout.block_q, layout.block_k, form.pv)
    order = layout.derived(("triton.order", B, H), lambda: work_order(layout, B, H))
    queries, known = (q, k) if keys is None else (keys.q, keys.k)
    loaded = v if values is None else values.v
    attend_kernel[(order.numel() * (layout.block_q // tile.rows),)](
        *(queries, None if keys is None else keys.q_scale, known, None if keys is None else keys.k_scale, loaded),
        *((None, None) if values is None else (values.scale, values.mean)),
        *(None if keys is None else keys.shift, out, lse, layout.kv_idx.contiguous(), layout.kv_num.contiguous()),
        *(layout.kv_lens, order, _table(reorder, q)),
        *(*queries.stride()[:3], *known.stride()[:3], *loaded.stride()[:2]),
        *((loaded.stride(2), 0) if values is None else (0, loaded.stride(2))),
        *out.stride()[:3],
        layout.heads * layout.n_q if layout.batch > 1 else 0,
        layout.n_q if layout.heads > 1 else 0,
        layout.kv_idx.shape[-1],
        *((1, 1) if keys is None else (keys.q_scale.shape[-1], keys.k_scale.shape[-1])),
        *(H, H // known.shape[1], H // loaded.shape[1], 1 if values is None else H // values.scale.shape[1]),
        *(layout.n_q, layout.q_len, layout.kv_len, *_span(reorder), scale * LOG2E, LARGEST.get(form.pv, 1.0)),
        D=D,
        D_PAD=padded(D),
        BLOCK_Q=layout.block_q,
        BLOCK_K=layout.block_k,
        BM=tile.rows,
        BN=tile.keys,
        Q_GROUP=groups_of(layout.block_q, layout.block_k)[0],
        ROWS=min(P_ROWS, tile.rows) if form.p_scale == "block" else 0,
        QK=int(keys is not None),
        PV=0 if values is None else 2 if form.pv == "fp8" else 1,
        SMOOTH_V=values is not None and values.mean is not None,
        SHIFT=keys is not None and keys.shift is not None,
        LENGTHS=layout.kv_lens is not None,
        REORDER=reorder is not None,
        PRECISION="ieee" if q.dtype == torch.float32 and q.device.type != "cuda" else "tf32x3",
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _table(reorder: Reorder | None, x: Tensor) -> Tensor | None:
    return None if reorder is None else address_table(reorder.codes, reorder.grid, x.device)


def _span(reorder: Reorder | None) -> tuple[int, int]:
    if reorder is None:
        return 0, 0
    return reorder.start, reorder.start + reorder.grid[0] * reorder.grid[1] * reorder.grid[2]
