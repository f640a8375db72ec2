"""The opaque op through which a compiled graph reaches a site's chain.

One op for all sites, with the site as a tensor: the compiler sees the same call in every block and keeps one graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchkit.errors import PatchkitError
from patchkit.sites import by_number


@torch.library.custom_op("patchkit::attend", mutates_args=())
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    site: Tensor,
    index: int,
    scale: float | None,
    causal: bool,
    grouped: bool,
    dropout: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """Run a site's chain on (B, H, N, D) tensors; returns contiguous (B, Nq, H, Dv)."""
    extra: dict[str, Any] = {"dropout": dropout, "grouped": grouped, "compiled": True}
    if sliding_window is not None:
        extra["sliding_window"] = sliding_window
    if softcap is not None:
        extra["softcap"] = softcap
    out = by_number(int(site)).run(q, k, v, mask, scale, causal, index, extra)
    out = out.transpose(1, 2).contiguous()
    # an op must not return its inputs
    shared = {t.untyped_storage().data_ptr() for t in (q, k, v)}
    return out.clone() if out.untyped_storage().data_ptr() in shared else out


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


def _backward(ctx: Any, grad: Tensor) -> Any:
    raise PatchkitError(
        "a patch inside a compiled graph has no gradients, because its chain runs outside of the graph",
        "torch.compile",
        "train uncompiled, or remove the patch while training; adapters of tuned recipes can be trained compiled",
    )


attend.register_autograd(_backward)
