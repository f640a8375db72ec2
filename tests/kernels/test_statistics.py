"""Statistics of attention blocks against the whole map."""

from __future__ import annotations

import pytest
import torch

from patchkit.kernels import KernelTypeError, KernelValueError, block_mass, block_statistics, dense_attention
from patchkit.kernels.dense.reference import dense_attention_reference
from patchkit.kernels.statistics import blocked
from patchkit.kernels.statistics.reference import block_statistics_reference


@pytest.mark.parametrize(("N", "M", "block"), [(128, 192, 64), (100, 70, 32), (64, 64, 20)])
@pytest.mark.parametrize("tile", [512 * 1024, 64 * 40])
def test_equals_the_map(qkv, close, monkeypatch, N, M, block, tile):
    monkeypatch.setattr(blocked, "TILE", tile)
    q, k, v = qkv(2, 4, 2, N, M, 32)
    _, lse = dense_attention_reference(q, k, v)
    found = block_statistics(q, k, lse, block, 5e-3)
    wanted = block_statistics_reference(q, k, lse, block, 5e-3)
    close(found[0], wanted[0], 1e-5)
    close(found[1], wanted[1], 1e-5)
    assert float((found[2] - wanted[2]).abs().max()) <= 1  # an entry on the very edge
    assert 0 < float(found[2].mean()) < block * block


def test_sums_are_the_mass(qkv, close):
    q, k, v = qkv(1, 2, 2, 128, 128, 32, torch.bfloat16)
    _, lse = dense_attention(q, k, v, return_lse=True)
    close(block_statistics(q, k, lse, 64)[0], block_mass(q, k, lse, 64, 64), 1e-4)


def test_what_it_refuses(qkv):
    q, k, v = qkv(1, 2, 2, 64, 64, 32)
    _, lse = dense_attention_reference(q, k, v)
    with pytest.raises(KernelValueError, match="must be positive"):
        block_statistics(q, k, lse, 0)
    with pytest.raises(KernelValueError, match="lse"):
        block_statistics(q, k, lse[:, :1])
    with pytest.raises(KernelTypeError):
        block_statistics(q, k.half(), lse)
