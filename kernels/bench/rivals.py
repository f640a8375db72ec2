"""What our operator is measured against: torch's dense kernels, each by itself, and FlexAttention on our blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import BlockLayout
from .timing import Call

BACKENDS = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}


def dense_calls(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> dict[str, Call]:
    """One call for each fused dense kernel of torch, forced; whether it works here shows when it is called.

    Away from CUDA torch has one kernel a device, and nothing to force.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def plain() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])

    def call(backend: Any) -> Tensor:
        with sdpa_kernel(backend):
            return plain()

    if q.device.type != "cuda":
        return {"torch": plain}
    return {name: functools.partial(call, getattr(SDPBackend, member)) for name, member in BACKENDS.items()}


def flex_call(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout) -> Call:
    """Compiled FlexAttention over the same blocks. Compiled once a process for shapes of one kind."""
    mask = layout.to_flex()
    options = {"BLOCK_M": layout.block_q, "BLOCK_N": layout.block_k} if layout.block_q < 128 else None
    run, grouped = _compiled_flex(), q.shape[1] != k.shape[1]
    return lambda: run(q, k, v, block_mask=mask, enable_gqa=grouped, kernel_options=options)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)  # type: ignore[no-any-return]


def attempt(call: Call, judge: Callable[[Tensor], float], limit: float) -> str | None:
    """Why a rival takes no part: it raises here, or what it returns is wrong. None when it is fine."""
    try:
        error = judge(call())
    except Exception as problem:  # each backend has its own way of refusing a shape, a dtype or a device
        told = " ".join(str(problem).split()) or type(problem).__name__
        return f"not here: {told[:160]}"
    return None if error <= limit else f"wrong: relative RMS error {error:.1e}"
