"""The small problem that every operator of the survey solves, and how the path that it takes is told."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..gpu import obstacle
from ..layout import BlockLayout

# Small and awkward: ragged last blocks, two query heads on one KV head, a text-like complete row.
TOKENS, HEADS, D, BLOCK = 300, 2, 64, 64
# A layout as long as those that the kernels are for, to ask for the path; nothing is computed with it.
LONG = 32_768

Tensors = tuple[Tensor, ...]


class Problem(NamedTuple):
    """The small problem that every operator solves, in one dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    layout: BlockLayout

    @property
    def exact(self) -> Problem:
        """The same inputs in fp32."""
        return Problem(self.q.float(), self.k.float(), self.v.float(), self.layout)

    @property
    def here(self) -> Problem:
        """The same inputs in fp32 on the CPU, for references that work there."""
        return Problem(self.q.float().cpu(), self.k.float().cpu(), self.v.float().cpu(), self.layout)


Solve = Callable[[Problem], Tensors]
Why = Callable[[torch.device], tuple[str, str]]
Operator = tuple[Why, tuple[torch.dtype, ...], Solve, Solve]


def example(dtype: torch.dtype, device: torch.device) -> Problem:
    """Random q, k, v and a layout with complete rows."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, HEADS, TOKENS, D), (1, 1, TOKENS, D), (1, 1, TOKENS, D))
    q, k, v = (torch.randn(s, generator=generator).to(device, dtype) for s in shapes)
    n = -(-TOKENS // BLOCK)
    kept = torch.rand(1, HEADS, n, n, generator=generator) < 0.4
    kept[..., -1, :] = True
    layout = BlockLayout.from_bool(kept, block_q=BLOCK, block_k=BLOCK, q_len=TOKENS, kv_len=TOKENS)
    return Problem(q, k, v, layout.to(device))


def path_of(module: str) -> Callable[[torch.device], tuple[str, str]]:
    """The Triton kernel where there is one and nothing is in its way, else plain torch in blocks."""

    def path(device: torch.device) -> tuple[str, str]:
        missing = obstacle(device)
        if missing is None and importlib.util.find_spec(f"patchkit.kernels.{module}") is None:
            missing = "no Triton kernel for it yet"
        return ("triton", "Triton kernel") if missing is None else ("blocked", missing)

    return path
