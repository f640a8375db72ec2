"""The operators keep one graph under torch.compile, pass torch's own operator checks, and stay small in memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from patchkit.kernels import BlockLayout, ElementRule, block_mass, block_sparse_attention, dense_attention


def test_one_graph(qkv):
    q, k, v = qkv(1, 2, 2, 200, 300, 64)
    layout = BlockLayout.from_bool(
        torch.rand(1, 2, 4, 5, generator=torch.Generator().manual_seed(0)) < 0.6,
        block_q=64,
        block_k=64,
        q_len=200,
        kv_len=300,
        rule=ElementRule(causal_offset=100),
    )

    def step(q, k, v):
        dense, lse = dense_attention(q, k, v, return_lse=True)
        sparse, sparse_lse = block_sparse_attention(q, k, v, layout, return_lse=True)
        return dense, lse, block_mass(q, k, lse, 64, 64), sparse, sparse_lse

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    with torch.no_grad():
        for got, want in zip(compiled(q, k, v), step(q, k, v), strict=True):
            assert torch.equal(got, want)


def test_operator_registrations(qkv):
    q, k, v = qkv(1, 2, 1, 100, 130, 64)
    keep = torch.tensor([[True, False, True], [False, True, False]])
    layout = BlockLayout.from_bool(keep, block_q=64, block_k=64, q_len=100, kv_len=130)
    lse = torch.zeros(1, 2, 100)
    lists = (layout.kv_idx, layout.kv_num, None, None, None, None, None, None)
    checks = ("test_schema", "test_faketensor")
    for op, args in [
        (torch.ops.patchkit.block_sparse_attention, (q, k, v, *lists, 64, 64, None, 0.125, 1)),
        (torch.ops.patchkit.block_mass, (q, k, lse, 64, 64, None, True, 0.125)),
        (torch.ops.patchkit.dense_attention_lse, (q, k, v, None, None, False)),
    ]:
        torch.library.opcheck(op.default, args, test_utils=checks)


def peak_bytes(work) -> int:
    """Growth of the resident set at its highest while ``work`` runs (Linux resets the mark through clear_refs)."""

    def field(name: str) -> int:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
        return int(line.split()[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")
    start = field("VmRSS")
    work()
    return field("VmHWM") - start


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak memory counter")
def test_no_quadratic_memory():
    """At 16,384 tokens one L x L fp32 tensor is 1 GiB; search, selection and attention together stay far below."""
    n, d = 16384, 16
    q, k, v = torch.randn(3, 1, 1, n, d, generator=torch.Generator().manual_seed(0)).unbind(0)
    lse = torch.full((1, 1, n), 10.0)

    def work() -> None:
        W = block_mass(q, k, lse, 64, 64)
        layout = BlockLayout.from_topk(W, 13, block_q=64, block_k=64, q_len=n, kv_len=n)
        assert layout.nbytes() == 256 * 13 * 2 + 256 * 4
        block_sparse_attention(q, k, v, layout)

    assert peak_bytes(lambda: torch.ones(n // 2, n // 2)) > 200 * 2**20  # the meter sees a quarter of L x L
    assert peak_bytes(work) < 64 * 2**20
