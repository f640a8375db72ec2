"""The Triton kernels of quantised attention, of reordering and of block statistics, interpreted."""

from __future__ import annotations

import pytest
import torch

from patchkit.kernels import BlockLayout, Format, Reorder
from patchkit.kernels.dense.reference import dense_attention_reference
from patchkit.kernels.quantised.dense import dense_layout
from patchkit.kernels.quantised.operands import keys_of, values_of
from patchkit.kernels.quantised.reference import quantised_reference
from patchkit.kernels.reorder.reference import reorder_reference
from patchkit.kernels.statistics.reference import block_statistics_reference

pytestmark = pytest.mark.usefixtures("nan_buffers")


@pytest.fixture
def launch(on_triton):
    from patchkit.kernels.quantised.triton import launch

    return launch


def order_of(heads, N, text=7):
    grid = {63: (2, 4, 7), 127: (4, 5, 6)}[N]
    return Reorder(tuple(range(heads)), grid, N - grid[0] * grid[1] * grid[2])


@pytest.mark.parametrize("qk", ["int8", "int4"])
@pytest.mark.parametrize("reordered", [False, True])
@pytest.mark.parametrize(("D", "smooth", "lens"), [(64, True, None), (40, True, [127, 80]), (64, False, [127, 0])])
def test_rounded_rows_are_equal_to_the_last_bit(launch, qkv, qk, reordered, D, smooth, lens):
    q, k, _ = qkv(2, 4, 2, 127, 127, D, torch.float16)
    k = k + 1
    reorder = order_of(4, 127) if reordered else None
    if reordered and lens:
        pytest.skip("padding stands behind the grid")
    kv_lens = None if lens is None else torch.tensor(lens, dtype=torch.int32)
    for b, n in enumerate(lens or ()):
        k[b, :, n:] = float("nan")
    form = Format(qk, smooth_k=smooth)
    found = launch.keys_of_triton(q, k, form, (32, 64), 0.125, lens, kv_lens, reorder)
    if reorder:
        q, k = (reorder_reference(x, reorder.codes, reorder.grid, reorder.start) for x in (q, k))
    wanted = keys_of(q, k, form, (32, 64), 0.125, lens)
    assert torch.equal(found.q[..., :D], wanted.q)
    assert torch.equal(found.k[..., :D], wanted.k)
    assert not found.q[..., D:].any()
    assert torch.equal(found.q_scale, wanted.q_scale)
    assert torch.equal(found.k_scale, wanted.k_scale)
    assert (found.shift is None) == (wanted.shift is None)
    if smooth:
        assert torch.allclose(found.shift, wanted.shift, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pv", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("reordered", [False, True])
def test_rounded_values_are_equal_to_the_last_bit(launch, qkv, pv, reordered):
    _, _, v = qkv(2, 4, 2, 127, 127, 40, torch.float16)
    v = v * torch.arange(1, 41) + 3
    v = v.half()
    reorder = order_of(4, 127) if reordered else None
    found = launch.values_of_triton(v, Format(pv=pv), 64, None, None, reorder, 4)
    wanted = values_of(v, Format(pv=pv), None)
    rows = wanted.v if reorder is None else reorder_reference(wanted.v, reorder.codes, reorder.grid, reorder.start)
    made = found.v.float()[:, :, :40, :127].transpose(-1, -2)
    if pv == "fp8":  # the interpreter rounds to e4m3 otherwise than torch and the hardware
        assert float((made - rows).norm() / rows.norm()) < 0.05
        assert bool((made[rows == 0] == 0).all())
    else:
        assert torch.equal(made, rows)
    assert not found.v.float()[..., 127:].any()
    assert torch.equal(found.scale, wanted.scale)


FORMS = [
    pytest.param(Format(), torch.float16, id="int8"),
    pytest.param(Format("int4", smooth_k=False), torch.float16, id="int4"),
    pytest.param(Format("int8", "int8"), torch.float16, id="int8-int8"),
    pytest.param(Format("int8", "int8", p_scale="row", smooth_v=False), torch.float16, id="by-row"),
    pytest.param(Format("none", "int4"), torch.float16, id="none-int4"),
    pytest.param(Format("int8", "fp8"), torch.float16, id="fp8"),
    pytest.param(Format("none", "none"), torch.float32, id="none"),
    pytest.param(Format("int8", "int8"), torch.float32, id="fp32"),
]


def spread_layout(N, M, bq, bk, heads, lens=None):
    kept = torch.rand(1, heads, -(-N // bq), -(-M // bk), generator=torch.Generator().manual_seed(1)) < 0.5
    kept[..., 0] = True
    kept[:, 0, 0] = True
    kept[:, -1, -1] = False
    return BlockLayout.from_bool(kept, block_q=bq, block_k=bk, q_len=N, kv_len=M, kv_lens=lens)


@pytest.mark.parametrize(("form", "dtype"), FORMS)
@pytest.mark.parametrize(
    ("B", "H", "Hkv", "N", "M", "D", "bq", "bk"),
    [(1, 2, 1, 127, 200, 64, 64, 64), (2, 2, 2, 63, 130, 40, 64, 64), (1, 1, 1, 150, 160, 64, 128, 128)],
)
def test_attends_as_the_formula_says(launch, qkv, close, close_lse, form, dtype, B, H, Hkv, N, M, D, bq, bk):
    q, k, v = qkv(B, H, Hkv, N, M, D, dtype)
    k, v = k + 1, v - 1
    layout = spread_layout(N, M, bq, bk, H)
    out, lse = launch.quantised_triton(q, k, v, layout, form, D**-0.5, None)
    wanted, wanted_lse = quantised_reference(q, k, v, layout, form)
    # a quotient next to the edge between two integers may fall either way: 16-bit rounding of P and of the output
    # the interpreter's own rounding to e4m3 is another one
    close(out, wanted, 0.015 if form.pv == "fp8" else 3e-3 if dtype == torch.float16 else 3e-4)
    assert torch.equal(lse.isneginf(), wanted_lse.isneginf())
    assert torch.allclose(lse.masked_fill(lse.isneginf(), 0), wanted_lse.masked_fill(lse.isneginf(), 0), atol=2e-4)


@pytest.mark.parametrize("form", [Format(), Format("int8", "int8"), Format("none", "int8")], ids=["qk", "both", "pv"])
def test_dense_with_padding_that_is_never_read(launch, qkv, close, form):
    q, k, v = qkv(2, 2, 1, 100, 200, 64, torch.float16)
    lens = torch.tensor([130, 64], dtype=torch.int32)
    for b, n in enumerate(lens.tolist()):
        k[b, :, n:], v[b, :, n:] = 0, 0
    layout = dense_layout(q, k, lens)
    wanted, _ = quantised_reference(q, k, v, layout, form)
    for b, n in enumerate(lens.tolist()):
        k[b, :, n:], v[b, :, n:] = float("nan"), float("nan")
    out, _ = launch.quantised_triton(q, k, v, layout, form, 0.125, None)
    close(out, wanted, 3e-3)


@pytest.mark.parametrize("form", [Format(), Format("int8", "int8"), Format("none", "none")], ids=["qk", "both", "none"])
def test_reads_and_writes_in_each_heads_order(launch, qkv, close, form):
    q, k, v = qkv(1, 6, 2, 63, 63, 64, torch.float16)
    order = order_of(6, 63)
    out, lse = launch.quantised_triton(q, k, v, dense_layout(q, k, None), form, 0.125, order)
    arguments = (order.codes, order.grid, order.start)
    moved = [reorder_reference(x, *arguments) for x in (q, k, v)]
    wanted, wanted_lse = quantised_reference(*moved, dense_layout(q, k, None), form, 0.125)
    close(out, reorder_reference(wanted, *arguments, inverse=True), 3e-3)
    back = reorder_reference(wanted_lse[..., None], *arguments, inverse=True)[..., 0]
    assert torch.allclose(lse, back, atol=2e-4)


def test_the_operator_takes_this_path(launch, qkv, close, monkeypatch):
    from patchkit.kernels import quantised_attention

    calls, kernel = [], launch.quantised_triton
    monkeypatch.setattr(launch, "quantised_triton", lambda *a: calls.append(1) or kernel(*a))
    q, k, v = qkv(1, 1, 1, 70, 70, 32, torch.float16)
    out = quantised_attention(q, k, v)
    close(out, quantised_reference(q, k, v, dense_layout(q, k, None), Format())[0], 3e-3)
    assert calls


# --- reordering and statistics -------------------------------------------------------------------------------------


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("D", [64, 40])
def test_three_tensors_reordered_in_one_pass(on_triton, qkv, D, inverse):
    from patchkit.kernels.reorder.triton import reorder_triton

    q, k, v = qkv(2, 6, 3, 127, 127, D, torch.float16)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    order = order_of(6, 127)
    found = reorder_triton([q, k, v], order.codes, order.grid, order.start, inverse)
    for x, y in zip((q, k, v), found, strict=True):
        assert torch.equal(y, reorder_reference(x, order.codes, order.grid, order.start, inverse))


@pytest.mark.parametrize(
    ("N", "M", "D", "block", "dtype"), [(130, 100, 40, 64, torch.float16), (70, 63, 64, 32, torch.float32)]
)
def test_statistics_of_blocks(on_triton, qkv, close, N, M, D, block, dtype):
    from patchkit.kernels.statistics.triton import block_statistics_triton

    q, k, v = qkv(1, 2, 1, N, M, D, dtype)
    _, lse = dense_attention_reference(q, k, v)
    found = block_statistics_triton(q, k, lse, block, 5e-3, D**-0.5)
    wanted = block_statistics_reference(q, k, lse, block, 5e-3)
    close(found[0], wanted[0], 1e-5)
    close(found[1], wanted[1], 1e-5)
    assert float((found[2] - wanted[2]).abs().max()) <= 1
