"""Dense attention with LSE, block mass and state merging."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from patchkit.kernels import (
    GradientError,
    KernelTypeError,
    KernelValueError,
    block_mass,
    dense_attention,
    merge_states,
)
from patchkit.kernels.dense.library import _chunked
from patchkit.kernels.dense.reference import dense_attention_reference
from patchkit.kernels.mass.reference import block_mass_reference


@pytest.mark.parametrize("D", [60, 64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["plain", "gqa", "causal", "bool", "additive", "scale"])
def test_lse_does_not_change_the_output(qkv, close_lse, D, dtype, case):
    q, k, v = qkv(2, 4, 1 if case == "gqa" else 4, 200, 233, D, dtype)
    extra = {
        "causal": {"causal": True},
        "bool": {"mask": torch.rand(2, 1, 200, 233, generator=torch.Generator().manual_seed(1)) < 0.5},
        "additive": {"mask": torch.randn(200, 233, generator=torch.Generator().manual_seed(1)).to(dtype)},
        "scale": {"scale": 0.3},
        "gqa": {"enable_gqa": True},
    }.get(case, {})
    library = {("is_causal" if n == "causal" else "attn_mask" if n == "mask" else n): x for n, x in extra.items()}
    expected = F.scaled_dot_product_attention(q, k, v, **library)
    out, lse = dense_attention(q, k, v, return_lse=True, **extra)
    assert torch.equal(out, expected)
    assert torch.equal(dense_attention(q, k, v, **extra), expected)
    extra.pop("enable_gqa", None)
    _, truth = dense_attention_reference(q, k, v, **extra)
    if dtype == torch.float32:
        close_lse(lse, truth)
    else:
        assert torch.allclose(lse, truth, atol=2e-2)


def test_fully_masked_rows(qkv):
    q, k, v = qkv(2, 2, 2, 100, 700, 64)
    mask = torch.rand(2, 1, 100, 700, generator=torch.Generator().manual_seed(0)) < 0.2
    mask[:, :, 7], mask[0, :, 9, :600] = False, False
    additive = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    for m in (mask, additive):
        out, lse = dense_attention(q, k, v, mask=m, return_lse=True)
        assert not out[:, :, 7].any()
        assert torch.equal(lse.isneginf(), (~mask).all(-1).expand(2, 2, 100))
        assert not out.isnan().any()


def test_unfused_path_agrees(qkv, close, close_lse):
    q, k, v = qkv(1, 4, 2, 700, 300, 64)
    for mask, causal in ((None, False), (None, True), (torch.ones(1, 1, 1, 300, dtype=torch.bool), False)):
        out, lse = _chunked(q, k, v, mask, None, causal)
        expected, truth = dense_attention_reference(q, k, v, mask, None, causal)
        close(out, expected)
        close_lse(lse, truth)


MASS_GRID = [
    pytest.param(2, 4, 1, 200, 333, 64, 64, 64, id="gqa4-ragged"),
    pytest.param(1, 2, 2, 1000, 1500, 60, 64, 64, id="several-tiles"),
    pytest.param(2, 2, 2, 63, 200, 80, 32, 16, id="small-blocks"),
    pytest.param(1, 1, 1, 700, 700, 128, 128, 64, id="q128"),
]


@pytest.mark.parametrize(("B", "H", "Hkv", "N", "M", "D", "bq", "bk"), MASS_GRID)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mass_equals_summed_softmax(qkv, close, B, H, Hkv, N, M, D, bq, bk, dtype):
    q, k, v = qkv(B, H, Hkv, N, M, D, dtype)
    _, lse = dense_attention_reference(q, k, v)
    W, r = block_mass(q, k, lse, bq, bk, return_row_sum=True)
    expected, _ = block_mass_reference(q, k, lse, bq, bk)
    close(W, expected, 1e-5)
    rows = torch.full((W.shape[2],), float(bq))
    rows[-1] = N - bq * (W.shape[2] - 1)
    assert torch.allclose(W.sum(-1), rows.expand(B, H, -1), rtol=1e-5)
    assert torch.allclose(r, torch.ones_like(r), atol=1e-5)


def test_row_sums_recover_the_current_lse(qkv):
    q, k, v = qkv(1, 2, 2, 300, 400, 64)
    _, lse = dense_attention(q, k, v, return_lse=True)
    stale = lse + torch.randn(lse.shape, generator=torch.Generator().manual_seed(0))
    _, r = block_mass(q, k, stale, 64, 64, return_row_sum=True)
    assert torch.allclose(stale + r.log(), lse, atol=1e-5)


@pytest.mark.parametrize("shift", [-1000.0, -60.0, -31.0, 50.0, 200.0])
@pytest.mark.parametrize("magnitude", [1.0, 8.0])
def test_stale_lse_and_large_logits(qkv, close, shift, magnitude):
    q, k, v = qkv(1, 2, 2, 200, 300, 64)
    q = q * magnitude
    _, lse = dense_attention(q, k, v, return_lse=True)
    lse[:, :, 100:] += shift
    lse[:, 0, 5] = float("-inf")
    W, r = block_mass(q, k, lse, 64, 64, return_row_sum=True)
    expected, rows = block_mass_reference(q, k, lse, 64, 64)
    close(W, expected, 1e-4)
    close(r, rows, 1e-4)
    assert float(r[0, 0, 5]) == 0


def test_keys_past_the_end_are_not_read(qkv):
    q, k, v = qkv(3, 2, 1, 130, 300, 64)
    lens = torch.tensor([300, 170, 0])
    _, lse = dense_attention(q, k, v, return_lse=True, enable_gqa=True)
    clean = block_mass(q, k, lse, 64, 64, lens)
    expected, _ = block_mass_reference(q, k, lse, 64, 64, lens)
    assert torch.allclose(clean, expected, rtol=1e-4, atol=1e-6)
    k[1, :, 170:], k[2] = float("nan"), float("nan")
    assert torch.equal(block_mass(q, k, lse, 64, 64, lens), clean)


def test_strided_views(qkv):
    x = torch.randn(1, 200, 2, 3, 64, generator=torch.Generator().manual_seed(0)).permute(3, 0, 2, 1, 4)
    q, k, v = x.unbind(0)
    _, lse = dense_attention(q, k, v, return_lse=True)
    assert torch.allclose(block_mass(q, k, lse, 64, 64), block_mass_reference(q, k, lse, 64, 64)[0], rtol=1e-4)


def test_merge_of_empty_and_live_states(qkv, close, close_lse):
    q, k, v = qkv(1, 2, 2, 100, 300, 64)
    parts = [dense_attention(q, k[:, :, a:b], v[:, :, a:b], return_lse=True) for a, b in ((0, 120), (120, 300))]
    out, lse = merge_states(*parts[0], *parts[1])
    expected, truth = dense_attention(q, k, v, return_lse=True)
    close(out, expected)
    close_lse(lse, truth)
    nothing = (torch.zeros_like(out), torch.full_like(lse, float("-inf")))
    assert torch.equal(merge_states(*nothing, *parts[0])[0], parts[0][0])
    zero, dead = merge_states(*nothing, *nothing)
    assert not zero.any()
    assert bool(dead.isneginf().all())


def test_bad_input_is_refused(qkv):
    q, k, v = qkv(1, 4, 2, 64, 64, 64)
    lse = torch.zeros(1, 4, 64)
    with pytest.raises(KernelValueError, match="enable_gqa"):
        dense_attention(q, k, v, return_lse=True)
    with pytest.raises(KernelTypeError, match="dtype"):
        dense_attention(q.half(), k, v, return_lse=True, enable_gqa=True)
    with pytest.raises(KernelValueError, match="diagonal"):
        dense_attention(q, q, q, mask=torch.ones(64, 64), causal=True, return_lse=True)
    with pytest.raises(KernelValueError, match="lse"):
        block_mass(q, k, lse[:, :, :3], 64, 64)
    with pytest.raises(KernelValueError, match="positive"):
        block_mass(q, k, lse, 0, 64)
    with pytest.raises(KernelValueError, match="kv_lens"):
        block_mass(q, k, lse, 64, 64, torch.tensor([1, 2]))
    with pytest.raises(KernelTypeError):
        block_mass(q.half(), k, lse, 64, 64)
    q.requires_grad_()
    with pytest.raises(GradientError):
        block_mass(q, k, lse, 64, 64)
    with pytest.raises(GradientError):
        dense_attention(q, k, v, return_lse=True, enable_gqa=True)
    dense_attention(q, k, v, enable_gqa=True).sum().backward()  # without LSE it is SDPA, gradients included
    assert q.grad is not None
