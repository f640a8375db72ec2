"""Quantised attention: the plain-torch path against the formulas, and the formulas against what they promise."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from patchkit.kernels import BlockLayout, Format, KernelValueError, LayoutError, Reorder, quantised_attention
from patchkit.kernels.dense.reference import dense_attention_reference
from patchkit.kernels.quantised.dense import dense_layout
from patchkit.kernels.quantised.reference import quantised_reference
from patchkit.kernels.sparse.reference import block_sparse_reference

FORMATS = [
    Format(),
    Format("int4"),
    Format("int8", "int8"),
    Format("none", "int8", p_scale="row"),
    Format("int4", "int4", smooth_k=False, smooth_v=False),
    Format("int8", "fp8"),
    Format("none", "none"),
]


def options(form):
    return {n: getattr(form, n) for n in ("qk", "pv", "smooth_k", "smooth_v", "p_scale")}


def relative_l1(found, wanted):
    return float((found.double() - wanted.double()).abs().sum() / wanted.double().abs().sum())


def cosine(found, wanted):
    return float(F.cosine_similarity(found.flatten().double(), wanted.flatten().double(), dim=0))


def norm_ratio(found, wanted):
    return float(found.double().norm() / wanted.double().norm())


def layout_for(N, M, bq=64, bk=64, heads=2, kv_lens=None, seed=0):
    kept = torch.rand(1, heads, -(-N // bq), -(-M // bk), generator=torch.Generator().manual_seed(seed)) < 0.5
    kept[..., 0] = True
    kept[:, 0, 0] = True  # a complete row
    kept[:, -1, -1] = False  # and one without a key
    return BlockLayout.from_bool(kept, block_q=bq, block_k=bk, q_len=N, kv_len=M, kv_lens=kv_lens)


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f"{f.qk}-{f.pv}-{f.p_scale}")
@pytest.mark.parametrize(
    ("N", "M", "bq", "bk"), [(200, 200, 64, 64), (63, 130, 64, 64), (150, 300, 128, 128), (100, 90, 32, 32)]
)
def test_equals_the_formula_over_a_layout(qkv, close, close_lse, form, N, M, bq, bk):
    q, k, v = qkv(2, 2, 1, N, M, 40)
    k, v = k + 2, v - 1
    layout = layout_for(N, M, bq, bk)
    out, lse = quantised_attention(q, k, v, layout, return_lse=True, **options(form))
    wanted, wanted_lse = quantised_reference(q, k, v, layout, form)
    # a product that falls on the edge between two integers may fall either way
    close(out, wanted, 3e-4 if form.pv != "none" else 1e-5)
    close_lse(lse, wanted_lse)
    assert bool((out[:, -1, (N - 1) // bq * bq :] == 0).all())


@pytest.mark.parametrize("form", FORMATS[:4], ids=lambda f: f"{f.qk}-{f.pv}")
def test_padding_is_never_read_and_takes_no_part(qkv, close, form):
    q, k, v = qkv(2, 2, 2, 100, 200, 32)
    lens = torch.tensor([200, 70], dtype=torch.int32)
    clean = quantised_attention(q[1:], k[1:, :, :70], v[1:, :, :70], **options(form))
    k[1, :, 70:], v[1, :, 70:] = float("nan"), float("nan")
    out = quantised_attention(q, k, v, kv_lens=lens, **options(form))
    close(out[1:], clean, 1e-5)


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f"{f.qk}-{f.pv}-{f.p_scale}")
def test_dense_and_no_attenuation_by_ragged_ends(qkv, form):
    """226 text tokens and a grid of 4 x 5 x 7: 366 keys are 5.7 blocks."""
    q, k, v = qkv(1, 2, 2, 366, 366, 64)
    v = v + 0.5
    out = quantised_attention(q, k, v, **options(form))
    wanted, _ = dense_attention_reference(q, k, v)
    limit = 0.15 if form.pv == "int4" else 0.01 if form.qk == "int4" else 0.003  # INT4 rounds small P to 0
    assert abs(norm_ratio(out, wanted) - 1) < limit
    assert cosine(out, wanted) > (0.9 if "int4" in (form.qk, form.pv) else 0.999)


def test_layout_rows_attend_to_what_is_kept_only(qkv, close):
    q, k, v = qkv(1, 2, 2, 200, 200, 64)
    layout = layout_for(200, 200)
    out = quantised_attention(q, k, v, layout)
    close(out, block_sparse_reference(q, k, v, layout)[0], 0.03)
    kept = BlockLayout.from_bool(
        torch.tensor([[True, False, True, False]] * 4), block_q=64, block_k=64, q_len=200, kv_len=200
    )
    clean = quantised_attention(q, k, v, kept, pv="int8", smooth_k=False, smooth_v=False)
    v[:, :, 64:128] = float("nan")
    assert bool(quantised_attention(q, k, v, kept, smooth_k=False).isfinite().all())
    assert bool(clean.isfinite().all())


# --- what the paper promises ---------------------------------------------------------------------------------------


def test_int8_qk_on_gaussians_and_what_smoothing_buys(qkv):
    q, k, v = qkv(1, 1, 1, 1024, 1024, 64)
    exact, _ = dense_attention_reference(q, k, v)
    out = quantised_attention(q, k, v)
    assert relative_l1(out, exact) <= 0.02
    assert cosine(out, exact) >= 0.9998
    k = k.clone()
    k[..., 3] += 8  # a channel bias of eight sigma
    exact, _ = dense_attention_reference(q, k, v)
    smooth, raw = (relative_l1(quantised_attention(q, k, v, smooth_k=s), exact) for s in (True, False))
    assert smooth < raw / 2


def sink(n=2048):
    """Key 0 with logit 9 among logits of about N(0, 1), values with a channel bias of 8, the sink's own value 0."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, n, 64, generator=g) for _ in range(3))
    q[..., 0], k[..., 0] = 8.0, 0.0
    k[:, :, 0] = 0
    k[:, :, 0, 0] = 9.0  # times 8, at a scale of 1/8
    v = v + 8 * torch.where(torch.arange(64) % 2 == 0, 1.0, -1.0)
    v[:, :, 0] = 0
    return q, k, v


def test_block_scales_of_p_beat_a_static_one():
    """Oracle 8, with its figures: relative L1 0.986 and 0.031, with smooth values 0.003 and 0.0006."""
    q, k, v = sink()
    exact, _ = dense_attention_reference(q, k, v)
    assert float((q[0, 0] @ k[0, 0].T / 8).softmax(-1)[:, 0].mean()) == pytest.approx(0.7, abs=0.02)
    found = {}
    for p_scale in ("static", "block", "row"):
        for smooth in (False, True):
            form = {"qk": "none", "pv": "int8", "p_scale": p_scale, "smooth_v": smooth}
            found[p_scale, smooth] = quantised_attention(q, k, v, **form)
    errors = {name: relative_l1(out, exact) for name, out in found.items()}
    assert errors["static", False] == pytest.approx(0.986, abs=0.01)
    assert errors["block", False] == pytest.approx(0.031, abs=0.003)
    assert errors["static", True] == pytest.approx(0.003, abs=0.001)
    assert errors["block", True] == pytest.approx(0.0006, abs=0.0002)
    assert all(errors["row", smooth] <= errors["block", smooth] for smooth in (False, True))
    assert cosine(found["static", False], exact) == pytest.approx(0.565, abs=0.02)
    assert cosine(found["block", False], exact) > 0.99995


@pytest.mark.parametrize("M", [17_776, 75_600])
@pytest.mark.parametrize(
    "form", [Format(), Format("int8", "int8"), Format("none", "fp8")], ids=lambda f: f"{f.qk}-{f.pv}"
)
def test_ragged_keys_of_long_videos_do_not_attenuate(qkv, form, M):
    """Oracle 5: CogVideoX (277.75 blocks) and Wan in 720p (1181.25): zeros behind the last key must take no part."""
    q, k, v = qkv(1, 1, 1, 40, M, 64)
    q, k, v = q * 0.5, k - 1, v + 0.5
    wanted, _ = dense_attention_reference(q, k, v)
    assert abs(norm_ratio(quantised_attention(q, k, v, **options(form)), wanted) - 1) < 1e-3


def test_rows_are_never_worse_than_blocks(qkv):
    q, k, v = qkv(1, 1, 1, 512, 512, 64)
    exact, _ = dense_attention_reference(q, k, v)
    block, row = (
        relative_l1(quantised_attention(q, k, v, qk="none", pv="int8", p_scale=s), exact) for s in ("block", "row")
    )
    assert row <= block < 0.05


def test_fp8_values_are_as_close_as_three_bits_of_mantissa(qkv):
    q, k, v = qkv(1, 1, 1, 512, 512, 64)
    exact, _ = dense_attention_reference(q, k, v)
    assert relative_l1(quantised_attention(q, k, v, qk="none", pv="fp8"), exact) < 0.06


def test_smoothing_is_taken_out_of_the_lse(qkv, close_lse):
    q, k, v = qkv(1, 2, 1, 100, 130, 32)
    k = k + 3 * torch.randn(32, generator=torch.Generator().manual_seed(1))
    _, wanted = dense_attention_reference(q, k, v)
    _, lse = quantised_attention(q, k, v, return_lse=True)
    assert float((lse - wanted).abs().max()) < 0.05
    assert float((lse - wanted).abs().max()) < 0.01 * float(wanted.abs().max())


# --- edges ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f"{f.qk}-{f.pv}-{f.p_scale}")
def test_zeros_constants_and_large_values_stay_finite(form):
    q = torch.randn(1, 1, 100, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    for k, v in ((torch.zeros_like(q), torch.zeros_like(q)), (torch.ones_like(q), torch.full_like(q, 1e4))):
        out, lse = quantised_attention(q, k, v, return_lse=True, **options(form))
        assert bool(out.isfinite().all())
        assert bool(lse.isfinite().all())
        assert torch.allclose(out.float(), v.float(), rtol=0.02)


def test_inputs_are_not_changed(qkv):
    tensors = qkv(1, 2, 2, 100, 100, 32)
    copies = [x.clone() for x in tensors]
    for form in FORMATS:
        quantised_attention(*tensors, **options(form))
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))


@pytest.mark.parametrize("form", FORMATS[:4], ids=lambda f: f"{f.qk}-{f.pv}")
def test_reordered_reading_and_writing(qkv, close, close_lse, form):
    """With everything kept, the order of tokens changes the groups of the rounding and nothing else."""
    from patchkit.kernels import reorder_heads

    q, k, v = qkv(2, 6, 3, 127, 127, 32)
    order = Reorder((0, 1, 2, 3, 4, 5), (4, 5, 6), 7)
    out, lse = quantised_attention(q, k, v, reorder=order, return_lse=True, **options(form))
    moved = reorder_heads(q, k, v, codes=order.codes, grid=order.grid, start=7)
    plain, plain_lse = quantised_attention(*moved, return_lse=True, **options(form))
    (back,) = reorder_heads(plain, codes=order.codes, grid=order.grid, start=7, inverse=True)
    close(out, back, 3e-4)
    (back_lse,) = reorder_heads(plain_lse[..., None], codes=order.codes, grid=order.grid, start=7, inverse=True)
    close_lse(lse, back_lse[..., 0])


def test_bnhd_and_scale(qkv, close):
    q, k, v = qkv(1, 2, 2, 70, 70, 32)
    out = quantised_attention(*(x.transpose(1, 2) for x in (q, k, v)), layout_fmt="BNHD", scale=0.3)
    close(out.transpose(1, 2), quantised_reference(q, k, v, dense_layout(q, k, None), Format(), 0.3)[0], 1e-5)


def test_compiles_to_one_graph(qkv, close):
    q, k, v = qkv(1, 2, 2, 70, 70, 32)
    run = torch.compile(lambda *x: quantised_attention(*x, pv="int8"), backend="eager", fullgraph=True)
    close(run(q, k, v), quantised_attention(q, k, v, pv="int8"), 1e-6)


def test_what_it_refuses(qkv):
    q, k, v = qkv(1, 2, 2, 70, 70, 32)
    with pytest.raises(KernelValueError, match="qk is 'int2'"):
        quantised_attention(q, k, v, qk="int2")
    with pytest.raises(KernelValueError, match="both a layout and kv_lens"):
        quantised_attention(q, k, v, layout_for(70, 70), kv_lens=torch.tensor([3]))
    ids = torch.arange(70) // 35
    partial = BlockLayout.from_segments(ids, ids, block_q=32, block_k=32)
    with pytest.raises(LayoutError, match="partial"):
        quantised_attention(q, k, v, partial)
    with pytest.raises(KernelValueError, match="one code for each query head"):
        quantised_attention(q, k, v, reorder=Reorder((0,), (2, 5, 7)))
