"""The Triton backward against the formula, in Triton's interpreter (fp32 and fp16)."""

from __future__ import annotations

import pytest
import torch

from patchkit.kernels import BlockLayout, ElementRule, block_sparse_attention
from patchkit.kernels.sparse.backward_reference import block_sparse_backward_reference
from patchkit.kernels.sparse.reference import block_sparse_reference

TOLERANCE = {torch.float32: 4e-6, torch.float16: 4e-3}

pytestmark = pytest.mark.usefixtures("nan_buffers")


def random_layout(shape, N, M, bq, bk, share=0.5, seed=1, **kw):
    g = torch.Generator().manual_seed(seed)
    keep = torch.rand(*shape, -(-N // bq), -(-M // bk), generator=g) < share
    return BlockLayout.from_bool(keep, block_q=bq, block_k=bk, q_len=N, kv_len=M, **kw)


def backward(*args):
    # Imported late: not before the interpreter is on.
    from patchkit.kernels.sparse.triton.backward_launch import block_sparse_backward_triton

    return block_sparse_backward_triton(*args)


def problem(q, k, v, layout, scale):
    """Output and LSE of the forward, and random gradients of both; NaN where the LSE has no gradient to give."""
    out, lse = block_sparse_reference(q.float(), k.float(), v.float(), layout, scale)
    g = torch.Generator().manual_seed(7)
    dout, dlse = torch.randn(out.shape, generator=g).to(q.dtype), torch.randn(lse.shape, generator=g)
    return out.to(q.dtype), lse, dout, dlse.masked_fill(lse.isneginf(), float("nan"))


def check(q, k, v, layout, close, scale=None, with_lse=True):
    """All three gradients agree with the reference; returns them."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse, dout, dlse = problem(q, k, v, layout, scale)
    dlse = dlse if with_lse else None
    found = backward(q, k, v, out, lse, dout, dlse, layout, scale)
    clean = (torch.where(torch.isfinite(x), x, 0).float() for x in (q, k, v))
    expected = block_sparse_backward_reference(*clean, out.float(), lse, dout.float(), dlse, layout, scale)
    for got, want, x in zip(found, expected, (q, k, v), strict=True):
        assert got.dtype == x.dtype
        assert got.is_contiguous()
        close(got, want, TOLERANCE[q.dtype])
    return found


GRID = [
    # B, H, Hkv, N, M, D, block_q, block_k, B', H'
    pytest.param(1, 2, 2, 63, 63, 60, 64, 16, 1, 2, id="one-short-row-d60"),
    pytest.param(2, 4, 1, 100, 133, 64, 64, 64, 2, 4, id="gqa4-ragged-both-batch-lists"),
    pytest.param(1, 1, 1, 500, 200, 80, 128, 64, 1, 1, id="n500-d80"),
    pytest.param(1, 4, 1, 64, 200, 128, 64, 64, 1, 4, id="d128-gqa4"),
    pytest.param(2, 3, 3, 40, 70, 64, 16, 32, 2, 1, id="small-blocks-head-shared"),
    pytest.param(1, 2, 2, 200, 260, 64, 256, 128, 1, 2, id="blocks-larger-than-the-tile"),
]


@pytest.mark.parametrize(("B", "H", "Hkv", "N", "M", "D", "bq", "bk", "Bl", "Hl"), GRID)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_equals_the_formula(qkv, close, B, H, Hkv, N, M, D, bq, bk, Bl, Hl, dtype):
    check(*qkv(B, H, Hkv, N, M, D, dtype), random_layout((Bl, Hl), N, M, bq, bk, 0.6), close)


@pytest.mark.parametrize("D", [200, 256])
def test_wide_heads(qkv, close, D):
    layout = random_layout((1, 2), 63, 130, 64, 64, 0.8, rule=ElementRule(causal_offset=67))
    check(*qkv(1, 2, 1, 63, 130, D, torch.float16), layout, close)


RULES = {
    "causal": lambda N, M: ElementRule(causal_offset=M - N),
    "causal-early": lambda N, M: ElementRule(causal_offset=-20),
    "segments": lambda N, M: ElementRule(
        q_seg=torch.stack([torch.arange(N) * 3 // N, torch.arange(N) * 2 // N]), kv_seg=torch.arange(M) * 3 // M
    ),
    "segments-causal-padded": lambda N, M: ElementRule(
        0, torch.arange(N) // 40, (torch.arange(M) // 40).masked_fill(torch.arange(M) > M - 20, -1)
    ),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("lens", [False, True], ids=["full", "kv_lens"])
def test_partial_blocks(qkv, close, rule, lens):
    N, M = 70, 110
    q, k, v = qkv(2, 2, 1, N, M, 64)
    kv_lens = torch.tensor([M - 40, M]) if lens else None
    layout = random_layout((1, 2) if not lens else (2, 2), N, M, 32, 32, 0.8, rule=RULES[rule](N, M), kv_lens=kv_lens)
    assert layout.part_num is not None
    check(q, k, v, layout, close)


@pytest.mark.parametrize("bk", [32, 128])
def test_row_bits(qkv, close, bk):
    N, M = 70, 200
    table = torch.rand(1, 2, N, M, generator=torch.Generator().manual_seed(3)) < 0.3
    table[..., :bk] = True
    layout = BlockLayout.from_mask_mod(
        lambda b, h, i, n: table[b, h, i, n], block_q=64, block_k=bk, q_len=N, kv_len=M, heads=2
    )
    assert layout.part_mask == "bits"
    check(*qkv(1, 2, 1, N, M, 64), layout, close)


@pytest.mark.parametrize("lens", [None, [70, 100], [129, 0]], ids=["whole", "ragged", "empty"])
def test_complete_rows_beside_sparse_ones(qkv, close, lens):
    """Implicit lists both ways: what stands in kv_idx for a complete row is never read."""
    N, M = 100, 130
    keep = torch.rand(2, 2, 4, 5, generator=torch.Generator().manual_seed(0)) < 0.3
    keep[:, :, 1] = True
    keep[0, 1, 3] = True
    keep[1, 0, :] = True
    kv_lens = None if lens is None else torch.tensor(lens)
    layout = BlockLayout.from_bool(keep, block_q=32, block_k=32, q_len=N, kv_len=M, kv_lens=kv_lens)
    complete = layout.kv_num == layout.valid_blocks
    assert complete.any()
    layout.kv_idx.masked_fill_(complete.unsqueeze(-1), 30000)
    check(*qkv(2, 2, 2, N, M, 64), layout, close)


def test_values_that_nothing_attends_to_never_leak(qkv, close):
    N, M = 100, 150
    q, k, v = qkv(2, 2, 2, N, M, 64)
    keep = torch.rand(2, 2, 4, 5, generator=torch.Generator().manual_seed(0)) < 0.7
    keep[..., 1] = False
    keep[0, 0, 2] = False
    layout = BlockLayout.from_bool(
        keep, block_q=32, block_k=32, q_len=N, kv_len=M, kv_lens=torch.tensor([117, 0]), rule=ElementRule(60)
    )
    for x in (k, v):
        x[:, :, 32:64] = float("nan")
        x[0, :, 117:] = float("nan")
        x[1] = float("nan")
    dq, dk, dv = check(q, k, v, layout, close)
    assert not dq[0, 0, 64:96].any()
    for x in (dk, dv):
        assert not x[:, :, 32:64].any()
        assert not x[0, :, 117:].any()
        assert not x[1].any()


@pytest.mark.parametrize("poisoned", ["k", "v"])
def test_keys_that_no_row_of_a_partial_block_keeps_are_never_used(unused_keys, close, poisoned):
    q, k, v, layout, unused = unused_keys(poisoned)
    _, dk, dv = check(q, k, v, layout, close)
    for x in (dk, dv):
        assert not x.transpose(1, 2)[unused].any()


def test_through_the_public_operator(on_triton, close):
    """Forward and backward, views of one fused projection, only some gradients, a scale below zero, twice alike."""
    x = torch.randn(1, 100, 3, 2, 64, generator=torch.Generator().manual_seed(0))
    q, k, v = (y.transpose(1, 2) for y in x.unbind(2))
    layout = random_layout((1, 2), 100, 100, 32, 32)
    inputs = [q.requires_grad_(), k, v.requires_grad_()]
    runs = []
    for _ in range(2):
        out, lse = block_sparse_attention(*inputs, layout, return_lse=True, scale=-0.2)
        runs.append(torch.autograd.grad(out.sum(), (q, v)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    with torch.no_grad():
        expected = block_sparse_backward_reference(q, k, v, out, lse, torch.ones_like(out), None, layout, -0.2)
    for got, want in zip(runs[0], (expected[0], expected[2]), strict=True):
        close(got, want, TOLERANCE[torch.float32])


def test_only_what_is_needed(qkv):
    q, k, v = qkv(1, 2, 1, 64, 64, 64)
    layout = random_layout((1, 2), 64, 64, 32, 32)
    out, lse, dout, dlse = problem(q, k, v, layout, 0.125)
    every = backward(q, k, v, out, lse, dout, dlse, layout, 0.125)
    for needs in [(True, False, False), (False, True, False), (False, False, True)]:
        found = backward(q, k, v, out, lse, dout, dlse, layout, 0.125, needs)
        for got, want, need in zip(found, every, needs, strict=True):
            assert torch.equal(got, want) if need else got is None


def test_gradient_of_the_lse_alone(qkv, close):
    q, k, v = qkv(1, 2, 1, 64, 64, 64)
    layout = random_layout((1, 2), 64, 64, 32, 32)
    out, lse, _, dlse = problem(q, k, v, layout, 0.125)
    found = backward(q, k, v, out, lse, None, dlse, layout, 0.125)
    expected = block_sparse_backward_reference(q, k, v, out, lse, None, dlse, layout)
    for got, want in zip(found, expected, strict=True):
        close(got, want, TOLERANCE[torch.float32])
