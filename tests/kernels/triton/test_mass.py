"""The Triton block mass, interpreted, against the formula."""

from __future__ import annotations

import pytest
import torch

from patchkit.kernels.dense.reference import dense_attention_reference
from patchkit.kernels.mass.reference import block_mass_reference

pytestmark = pytest.mark.usefixtures("nan_buffers")


@pytest.fixture
def mass(on_triton, monkeypatch):
    """``block_mass`` on CPU tensors, with row sums, through the interpreted kernel."""
    from patchkit.kernels import block_mass
    from patchkit.kernels.mass import triton

    calls, kernel = [], triton.block_mass_triton
    monkeypatch.setattr(triton, "block_mass_triton", lambda *a: calls.append(1) or kernel(*a))
    yield lambda *a, **kw: block_mass(*a, **({"return_row_sum": True} | kw))
    assert calls


GRID = [
    pytest.param(2, 4, 1, 63, 200, 64, 64, 64, torch.float16, id="gqa-ragged"),
    pytest.param(1, 2, 2, 200, 63, 80, 64, 64, torch.float16, id="padded-head"),
    pytest.param(1, 1, 1, 300, 200, 128, 128, 64, torch.float16, id="d128"),
    pytest.param(1, 2, 1, 140, 100, 64, 16, 16, torch.float16, id="many-blocks-in-a-tile"),
    pytest.param(1, 1, 1, 200, 1000, 64, 32, 128, torch.float16, id="keys-in-parts"),
    pytest.param(1, 1, 1, 300, 200, 64, 256, 256, torch.float16, id="larger-than-a-tile"),
    pytest.param(1, 1, 1, 70, 90, 256, 64, 64, torch.float16, id="d256"),
    pytest.param(1, 2, 2, 100, 200, 64, 64, 64, torch.float32, id="fp32"),
    pytest.param(1, 1, 1, 100, 100, 40, 128, 32, torch.float32, id="fp32-padded"),
    pytest.param(2, 1, 1, 1, 1, 64, 64, 64, torch.float16, id="one-token"),
]


@pytest.mark.parametrize(("B", "H", "Hkv", "N", "M", "D", "bq", "bk", "dtype"), GRID)
def test_equals_summed_softmax(mass, qkv, close, B, H, Hkv, N, M, D, bq, bk, dtype):
    q, k, v = qkv(B, H, Hkv, N, M, D, dtype)
    _, lse = dense_attention_reference(q, k, v)
    W, r = mass(q, k, lse, bq, bk)
    expected, rows = block_mass_reference(q, k, lse, bq, bk)
    assert W.dtype == torch.float32
    close(W, expected, 1e-5)
    close(r, rows, 1e-5)
    assert torch.equal(mass(q, k, lse, bq, bk, return_row_sum=False), W)


def test_keys_past_the_end_are_not_read(mass, qkv, close):
    q, k, v = qkv(4, 2, 1, 130, 200, 64, torch.float16)
    lens = torch.tensor([200, 128, 70, 0], dtype=torch.int32)
    _, lse = dense_attention_reference(q, k, v)
    for b, n in enumerate(lens.tolist()):
        k[b, :, n:] = float("nan")
    W, r = mass(q, k, lse, 64, 64, lens)
    expected, rows = block_mass_reference(q, k.nan_to_num(), lse, 64, 64, lens)
    close(W, expected, 1e-5)
    close(r, rows, 1e-5)
    assert not W[1, :, :, 2:].any()
    assert not W[3].any()


@pytest.mark.parametrize("shift", [-1000.0, -31.0, 50.0])
def test_a_stale_lse_cannot_overflow(mass, qkv, close, shift):
    q, k, v = qkv(1, 1, 1, 130, 100, 64)
    _, lse = dense_attention_reference(q, k, v)
    lse[:, :, 100:] += shift
    W, r = mass(q, k, lse, 64, 64)
    expected, rows = block_mass_reference(q, k, lse, 64, 64)
    close(W, expected, 1e-5)
    close(r, rows, 1e-5)


def test_rows_without_keys_and_rows_of_padding_count_nothing(mass, qkv, close):
    q, k, v = qkv(1, 1, 1, 130, 100, 64)
    _, lse = dense_attention_reference(q, k, v)
    lse[0, 0, 3], lse[0, 0, 70] = float("-inf"), float("inf")
    q[0, 0, 3] = float("nan")
    W, r = mass(q, k, lse, 64, 64)
    expected, _ = block_mass_reference(q, k, lse, 64, 64)
    close(W, expected, 1e-5)
    assert r[0, 0, [3, 70]].tolist() == [0, 0]
    assert W.sum(-1).flatten().tolist() == pytest.approx([63, 63, 2], rel=1e-5)


def test_a_nan_stays_one(mass, qkv):
    q, k, v = qkv(1, 1, 1, 128, 130, 64)
    _, lse = dense_attention_reference(q, k, v)
    k[0, 0, 129] = float("nan")
    W, r = mass(q, k, lse, 64, 64)
    assert W.isnan()[0, 0].tolist() == [[False, False, True]] * 2
    assert bool(r.isnan().all())


def test_strided_views(mass, close):
    x = torch.randn(2, 150, 2, 3, 64, generator=torch.Generator().manual_seed(0)).permute(3, 0, 2, 1, 4)
    q, k, v = x.half().unbind(0)
    _, lse = dense_attention_reference(q, k, v)
    spread = torch.stack([lse, lse + 1], dim=-1)[..., 0]
    assert not spread.is_contiguous()
    W, r = mass(q, k, spread, 64, 64)
    close(W, block_mass_reference(q, k, lse, 64, 64)[0], 1e-5)
    close(r, torch.ones_like(r), 1e-5)


def test_what_it_refuses():
    from patchkit.kernels.mass.triton import unsupported

    half, single = torch.zeros(1, 1, 4, 128, dtype=torch.float16), torch.zeros(1, 1, 4, 128)
    assert unsupported(half, 64, 128) is None
    assert "powers of two" in unsupported(half, 48, 64)
    assert "powers of two" in unsupported(half, 64, 8)
    assert "registers" in unsupported(single, 64, 64)
    assert "float64" in unsupported(single.double(), 64, 64)


def test_other_blocks_go_the_other_way(on_triton, monkeypatch, qkv, close):
    from patchkit.kernels import block_mass
    from patchkit.kernels.mass import triton

    monkeypatch.setattr(triton, "block_mass_triton", None)
    q, k, v = qkv(1, 1, 1, 100, 100, 64)
    _, lse = dense_attention_reference(q, k, v)
    close(block_mass(q, k, lse, 48, 64), block_mass_reference(q, k, lse, 48, 64)[0], 1e-5)
