"""Which implementation each operator takes on a device, and whether it agrees there with its reference."""

from __future__ import annotations

import torch
from torch import Tensor

from .dense import dense_attention
from .dense.reference import dense_attention_reference
from .layout import BlockLayout
from .mass import block_mass
from .mass.reference import block_mass_reference
from .merge import merge_states
from .sparse import block_sparse_attention, choose_path
from .sparse.reference import block_sparse_reference


def paths(device: torch.device | str = "cpu") -> dict[str, str]:
    """Operator -> the path it takes on ``device`` and its relative error against the fp32 reference.

    Runs each operator once on a small problem (two heads, 1,000 tokens, D = 64, blocks of 64, a fifth of them kept).
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 1000, 64, generator=generator).to(device) for _ in range(3))
    kept = torch.rand(1, 2, 16, 16, generator=generator) < 0.2
    layout = BlockLayout.from_bool(kept, block_q=64, block_k=64, q_len=1000, kv_len=1000).to(device)
    out, lse = dense_attention(q, k, v, return_lse=True)
    exact, exact_lse = dense_attention_reference(q, k, v)
    sparse = block_sparse_attention(q, k, v, layout)
    mass = block_mass(q, k, lse, 64, 64)
    half = dense_attention(q, k[:, :, :500], v[:, :, :500], return_lse=True)
    rest = dense_attention(q, k[:, :, 500:], v[:, :, 500:], return_lse=True)
    merged, _ = merge_states(*half, *rest)
    name = choose_path(layout, 64, q.dtype, q.device).name
    return {
        "dense_attention": f"torch's own, with LSE ({_error(out, exact)})",
        "block_sparse_attention": f"{name}, plain torch ({_error(sparse, block_sparse_reference(q, k, v, layout)[0])})",
        "block_mass": f"blocked, plain torch ({_error(mass, block_mass_reference(q, k, exact_lse, 64, 64))})",
        "merge_states": f"plain torch ({_error(merged, exact)})",
    }


def _error(found: Tensor, wanted: Tensor | tuple[Tensor, ...]) -> str:
    wanted = wanted if isinstance(wanted, Tensor) else wanted[0]
    relative = (found.float() - wanted.float()).norm() / wanted.float().norm()
    return f"relative error {relative.item():.0e}"
