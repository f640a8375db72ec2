"""Block-sparse attention against the masked dense softmax."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from patchkit.kernels import (
    BlockLayout,
    ElementRule,
    KernelTypeError,
    KernelValueError,
    LayoutError,
    block_sparse_attention,
    choose_path,
    dense_attention,
    merge_states,
)
from patchkit.kernels.sparse.blocked import operands, tiles
from patchkit.kernels.sparse.blocked.forward import block_sparse_blocked
from patchkit.kernels.sparse.reference import block_sparse_reference


def random_layout(shape, N, M, bq, bk, share=0.5, seed=1, **kw):
    g = torch.Generator().manual_seed(seed)
    keep = torch.rand(*shape, -(-N // bq), -(-M // bk), generator=g) < share
    return BlockLayout.from_bool(keep, block_q=bq, block_k=bk, q_len=N, kv_len=M, **kw)


GRID = [
    # B, H, Hkv, N, M, D, block_q, block_k, B', H'
    pytest.param(1, 2, 2, 63, 63, 60, 64, 64, 1, 2, id="shorter-than-a-block"),
    pytest.param(2, 4, 1, 200, 333, 64, 64, 64, 2, 4, id="gqa4-ragged-both-batch-masks"),
    pytest.param(2, 2, 2, 1000, 1000, 80, 64, 64, 1, 1, id="n1000-d80-shared-layout"),
    pytest.param(1, 4, 1, 128, 1000, 128, 128, 64, 1, 4, id="cross-lengths-q128"),
    pytest.param(2, 3, 3, 200, 130, 64, 32, 16, 2, 1, id="small-blocks-head-broadcast"),
    pytest.param(1, 1, 1, 300, 300, 64, 64, 128, 1, 1, id="wide-key-blocks"),
]


@pytest.mark.parametrize(("B", "H", "Hkv", "N", "M", "D", "bq", "bk", "Bl", "Hl"), GRID)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_equals_masked_dense(qkv, close, close_lse, B, H, Hkv, N, M, D, bq, bk, Bl, Hl, dtype):
    q, k, v = qkv(B, H, Hkv, N, M, D, dtype)
    layout = random_layout((Bl, Hl), N, M, bq, bk)
    expected, lse_expected = block_sparse_reference(q.float(), k.float(), v.float(), layout)
    out, lse = block_sparse_attention(q, k, v, layout, return_lse=True)
    assert out.dtype == dtype
    close(out, expected)
    if dtype == torch.float32:
        close_lse(lse, lse_expected)
        mask = layout.element_mask().expand(B, H, N, M)
        dense, dense_lse = dense_attention(q, k, v, mask=mask, return_lse=True, enable_gqa=True)
        close(dense, expected)
        close_lse(dense_lse, lse_expected)


RULES = {
    "causal": lambda N, M, B: ElementRule(causal_offset=M - N),
    "causal-early": lambda N, M, B: ElementRule(causal_offset=-40),
    "segments": lambda N, M, B: ElementRule(
        q_seg=(torch.arange(N) * 3 // N).expand(B, N).contiguous(), kv_seg=torch.arange(M) * 3 // M
    ),
    "segments-causal-padded": lambda N, M, B: ElementRule(
        0, torch.arange(N) // 90, (torch.arange(M) // 90).masked_fill(torch.arange(M) > M - 20, -1)
    ),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("lens", [False, True], ids=["full", "kv_lens"])
@pytest.mark.parametrize(("N", "M"), [(200, 333), (256, 256), (63, 190)])
def test_partial_blocks(qkv, close, close_lse, rule, lens, N, M):
    q, k, v = qkv(2, 4, 2, N, M, 64)
    kv_lens = torch.tensor([M - 70, M]) if lens else None
    layout = random_layout((1, 4), N, M, 64, 64, 0.8, rule=RULES[rule](N, M, 2), kv_lens=kv_lens)
    assert layout.part_mask != "none"
    out, lse = block_sparse_attention(q, k, v, layout, return_lse=True)
    expected, lse_expected = block_sparse_reference(q, k, v, layout)
    close(out, expected)
    close_lse(lse, lse_expected)


@pytest.mark.parametrize("bk", [32, 64, 100])
def test_row_bits_represent_any_pattern(qkv, close, bk):
    N, M = 130, 210
    table = torch.rand(2, 3, N, M, generator=torch.Generator().manual_seed(3)) < 0.3
    table[..., :bk] = True
    layout = BlockLayout.from_mask_mod(
        lambda b, h, i, n: table[b, h, i, n], block_q=64, block_k=bk, q_len=N, kv_len=M, batch=2, heads=3
    )
    assert layout.part_mask == "bits"
    assert torch.equal(layout.element_mask(), table)
    q, k, v = qkv(2, 3, 3, N, M, 64)
    close(block_sparse_attention(q, k, v, layout), dense_attention(q, k, v, mask=table))


def test_complete_layout_is_dense(qkv, close, close_lse):
    q, k, v = qkv(2, 4, 2, 200, 200, 64)
    layout = random_layout((1, 1), 200, 200, 64, 64, 1.1)
    assert layout.density() == 1
    assert choose_path(layout, 64).name == block_sparse_attention.plan(layout, 64).name == "dense"
    dense, dense_lse = dense_attention(q, k, v, return_lse=True, enable_gqa=True)
    out, lse = block_sparse_attention(q, k, v, layout, return_lse=True)
    assert torch.equal(out, dense)
    assert torch.equal(lse, dense_lse)
    blocked, blocked_lse = block_sparse_blocked(q, k, v, layout, 64**-0.5)
    close(blocked, dense)
    close_lse(blocked_lse, dense_lse)


def test_planned_path_names_what_pays():
    short = random_layout((1, 1), 256, 256, 64, 64)
    long = BlockLayout.from_topk(torch.rand(64, 64), 6, block_q=64, block_k=64, q_len=4096, kv_len=4096)
    thick = BlockLayout.from_topk(torch.rand(64, 64), 60, block_q=64, block_k=64, q_len=4096, kv_len=4096)
    assert [choose_path(x, 64).pays for x in (short, long, thick)] == [False, True, False]
    assert "too short" in choose_path(short, 64).reason
    assert "too dense" in choose_path(thick, 64).reason


def test_strided_views_and_formats(close):
    x = torch.randn(2, 300, 3, 4, 64, generator=torch.Generator().manual_seed(0))
    q, k, v = x.unbind(2)  # (B, N, H, D) slices of one fused projection
    layout = random_layout((2, 4), 300, 300, 64, 64)
    expected, _ = block_sparse_reference(*(y.transpose(1, 2) for y in (q, k, v)), layout)
    out = block_sparse_attention(q, k, v, layout, layout_fmt="BNHD")
    assert out.shape == q.shape
    close(out.transpose(1, 2), expected)


def test_empty_rows_are_zero(qkv):
    q, k, v = qkv(1, 2, 2, 200, 200, 64)
    keep = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    keep[0, 1, 2, 1] = True
    layout = BlockLayout.from_bool(keep, block_q=64, block_k=64, q_len=200, kv_len=200)
    out, lse = block_sparse_attention(q, k, v, layout, return_lse=True)
    live = torch.zeros(1, 2, 200, dtype=torch.bool)
    live[0, 1, 128:192] = True
    assert torch.equal(out.abs().sum(-1) > 0, live)
    assert torch.equal(lse.isneginf(), ~live)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("D", [64, 80])
def test_dropped_values_never_leak(qkv, close, D, poison):
    N, M = 200, 300
    q, k, v = qkv(2, 2, 2, N, M, D)
    kv_lens = torch.tensor([230, 0])
    keep = torch.rand(2, 2, 4, 5, generator=torch.Generator().manual_seed(0)) < 0.7
    keep[..., 1] = False
    layout = BlockLayout.from_bool(keep, block_q=64, block_k=64, q_len=N, kv_len=M, kv_lens=kv_lens)
    clean, clean_lse = block_sparse_attention(q, k, v, layout, return_lse=True)
    for x in (k, v):
        x[:, :, 64:128] = poison
        x[0, :, 230:] = poison
        x[1] = poison
    out, lse = block_sparse_attention(q, k, v, layout, return_lse=True)
    assert torch.equal(out, clean)
    assert torch.equal(lse, clean_lse)
    assert not out[1].any()


def test_poison_kept_by_another_row_stays_there(qkv):
    q, k, v = qkv(1, 1, 1, 1024, 1024, 64)
    keep = torch.eye(16, dtype=torch.bool)
    keep[:, 0] = True
    keep[3, 5] = True
    layout = BlockLayout.from_bool(keep, block_q=64, block_k=64, q_len=1024, kv_len=1024)
    v[:, :, 320:384] = float("nan")
    out = block_sparse_attention(q, k, v, layout)
    bad = out.isnan().any(-1)[0, 0].view(16, 64)
    assert bad.all(1).nonzero().flatten().tolist() == [3, 5]
    assert int(bad.sum()) == 128


def test_kv_lens_per_sample(qkv, close):
    q, k, v = qkv(3, 2, 1, 190, 400, 64)
    lens = torch.tensor([400, 129, 65])
    keep = torch.ones(3, 7, dtype=torch.bool)
    layout = BlockLayout.from_bool(keep, block_q=64, block_k=64, q_len=190, kv_len=400, kv_lens=lens)
    out = block_sparse_attention(q, k, v, layout)
    for b, n in enumerate(lens.tolist()):
        close(out[b : b + 1], dense_attention(q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n], enable_gqa=True))


def test_union_of_disjoint_layouts(qkv, close, close_lse):
    q, k, v = qkv(1, 2, 2, 333, 500, 64)
    both = torch.rand(1, 2, 6, 8, generator=torch.Generator().manual_seed(0)) < 0.7
    both[0, 0, 2] = False
    first = both & (torch.rand(both.shape, generator=torch.Generator().manual_seed(1)) < 0.5)
    make = lambda keep: BlockLayout.from_bool(keep, block_q=64, block_k=64, q_len=333, kv_len=500)  # noqa: E731
    parts = [block_sparse_attention(q, k, v, make(m), return_lse=True) for m in (first, both & ~first)]
    merged, lse = merge_states(*parts[0], *parts[1])
    expected, lse_expected = block_sparse_attention(q, k, v, make(both), return_lse=True)
    close(merged, expected)
    close_lse(lse, lse_expected)


def test_permuting_key_blocks_changes_nothing(qkv, close):
    q, k, v = qkv(1, 2, 2, 256, 512, 64)
    keep = torch.rand(1, 2, 4, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    moved = [x.unflatten(2, (8, 64))[:, :, order].flatten(2, 3) for x in (k, v)]
    make = lambda m: BlockLayout.from_bool(m, block_q=64, block_k=64, q_len=256, kv_len=512)  # noqa: E731
    close(block_sparse_attention(q, *moved, make(keep[..., order])), block_sparse_attention(q, k, v, make(keep)))


@pytest.mark.parametrize("splits", [1, 2, 5, 100])
def test_splits_and_repeats(qkv, close, close_lse, splits):
    q, k, v = qkv(1, 2, 1, 300, 700, 64)
    layout = random_layout((1, 2), 300, 700, 64, 64, 0.6, rule=ElementRule(causal_offset=500))
    expected, lse_expected = block_sparse_reference(q, k, v, layout)
    out, lse = block_sparse_attention(q, k, v, layout, return_lse=True, num_splits=splits)
    close(out, expected)
    close_lse(lse, lse_expected)
    assert torch.equal(out, block_sparse_attention(q, k, v, layout, num_splits=splits))


@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 40.0])
def test_any_logit_size(qkv, close, magnitude):
    q, k, v = qkv(1, 1, 1, 200, 300, 64)
    layout = random_layout((1, 1), 200, 300, 64, 64, 0.6)
    expected, _ = block_sparse_reference(q * magnitude, k, v, layout)
    close(block_sparse_attention(q * magnitude, k, v, layout), expected, 2e-5)


@pytest.mark.parametrize("offset", [-300.0, 300.0])
def test_logits_far_from_zero(qkv, close, close_lse, offset):
    """Sums that leave the range of fp32 are found and computed again, tile by tile; the others stay as they were."""
    q, k, v = qkv(1, 2, 2, 200, 300, 64)
    layout = random_layout((1, 2), 200, 300, 64, 64, 0.6)
    calm = block_sparse_attention(q, k, v, layout)
    k[..., 0] = 8.0
    q[:, 1, 64:, 0] = offset
    expected, lse_expected = block_sparse_reference(q, k, v, layout)
    out, lse = block_sparse_attention(q, k, v, layout, return_lse=True)
    close(out, expected, 2e-4)  # what rounding of a logit of 300 leaves
    assert torch.allclose(lse, lse_expected, rtol=1e-5, atol=1e-4)
    assert not torch.equal(calm, out)


def test_values_near_the_largest_number(qkv):
    q, k, v = qkv(1, 1, 1, 128, 256, 64)
    layout = random_layout((1, 1), 128, 256, 64, 64, 0.6)
    q, v = q * 3, v.clamp(-1, 1) * 1e37
    expected, _ = block_sparse_reference(q, k, v.double(), layout)
    out = block_sparse_attention(q, k, v, layout)
    assert float((out.double() - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hardware_that_multiplies_low_precision(qkv, close, monkeypatch, dtype):
    monkeypatch.setattr(operands, "native_low_precision", lambda: True)
    q, k, v = qkv(2, 4, 2, 200, 333, 64, dtype)
    layout = random_layout((2, 4), 200, 333, 64, 64, rule=ElementRule(causal_offset=200))
    expected, _ = block_sparse_reference(q.float(), k.float(), v.float(), layout)
    close(block_sparse_attention(q, k, v, layout), expected)


def test_plan_is_made_once_per_layout(qkv, monkeypatch):
    made = []
    plan = tiles._plan
    monkeypatch.setattr(tiles, "_plan", lambda *a: made.append(1) or plan(*a))
    q, k, v = qkv(2, 2, 1, 200, 300, 64)
    layout = random_layout((2, 2), 200, 300, 64, 64, 0.6)
    first = block_sparse_attention(q, k, v, layout)
    assert torch.equal(block_sparse_attention(q, k, v, layout), first)
    assert len(made) == 1
    block_sparse_attention(q.repeat(1, 1, 1, 2), k.repeat(1, 1, 1, 2), v.repeat(1, 1, 1, 2), layout)
    assert len(made) == 1
    block_sparse_attention(q, k, v, random_layout((2, 2), 200, 300, 64, 64, 0.6, seed=2))
    assert len(made) == 2


@pytest.mark.parametrize("budget", [1, 250_000, 2**30])
def test_spans_change_nothing(qkv, monkeypatch, budget):
    """Heads computed a few at a time give the same bits."""
    q, k, v = qkv(3, 4, 2, 200, 300, 64)
    layout = random_layout((3, 4), 200, 300, 64, 64, 0.6)
    expected = block_sparse_attention(q, k, v, layout)
    spans = operands.spans_of(q, k, budget)
    assert len(spans) == {1: 6, 250_000: 6, 2**30: 1}[budget]
    monkeypatch.setattr("patchkit.kernels.sparse.blocked.forward.spans_of", lambda q, k: spans)
    assert torch.equal(block_sparse_attention(q, k, v, layout), expected)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    N=st.integers(1, 150),
    M=st.integers(1, 150),
    D=st.sampled_from([8, 60, 64]),
    group=st.sampled_from([1, 2]),
    bq=st.sampled_from([16, 48, 64]),
    bk=st.sampled_from([16, 40, 64]),
    share=st.floats(0, 1),
    offset=st.none() | st.integers(-50, 150),
    seed=st.integers(0, 99),
)
def test_property_equals_reference(qkv, close, close_lse, N, M, D, group, bq, bk, share, offset, seed):
    q, k, v = qkv(2, 2, 2 // group, N, M, D, seed=seed)
    rule = None if offset is None else ElementRule(causal_offset=offset)
    lens = torch.tensor([M, M // 2])
    layout = random_layout((2, 1), N, M, bq, bk, share, seed, rule=rule, kv_lens=lens)
    expected, lse_expected = block_sparse_reference(q, k, v, layout)
    out, lse = block_sparse_attention(q, k, v, layout, return_lse=True)
    close(out, expected)
    close_lse(lse, lse_expected)


def test_bad_input_is_refused(qkv):
    q, k, v = qkv(1, 4, 2, 200, 200, 64)
    layout = random_layout((1, 4), 200, 200, 64, 64)
    for args, error in [
        ((q[0], k, v), KernelValueError),
        ((q, k, v[:, :, :100]), KernelValueError),
        ((q[:, :3], k, v), KernelValueError),
        ((q.half(), k, v), KernelTypeError),
        ((q.int(), k.int(), v.int()), KernelTypeError),
        ((q.transpose(2, 3).contiguous().transpose(2, 3), k, v), KernelValueError),
        ((q[:, :, :100], k, v), LayoutError),
        ((q[:, :2], k, v), LayoutError),
    ]:
        with pytest.raises(error, match="block_sparse_attention"):
            block_sparse_attention(*args, layout)
    with pytest.raises(KernelValueError, match="layout_fmt"):
        block_sparse_attention(q, k, v, layout, layout_fmt="NHD")
    with pytest.raises(KernelValueError, match="num_splits"):
        block_sparse_attention(q, k, v, layout, num_splits=0)
    with pytest.raises(KernelValueError, match="meta"):
        block_sparse_attention(q.to("meta"), k, v, layout)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("native", [False, True])
def test_low_precision_is_rounded_once(qkv, monkeypatch, dtype, native):
    """Large logits: the LSE is fp32's, and the output is as near as the rounding of the result allows."""
    monkeypatch.setattr(operands, "native_low_precision", lambda: native)
    q, k, v = qkv(1, 2, 2, 128, 256, 64, dtype)
    q, k = q * 4, k * 3
    layout = random_layout((1, 2), 128, 256, 64, 64, 0.6)
    expected, expected_lse = block_sparse_reference(q.double(), k.double(), v.double(), layout)
    out, lse = block_sparse_attention(q, k, v, layout, return_lse=True)
    limit = (8 if native else 1) * {torch.bfloat16: 2.5e-3, torch.float16: 4e-4}[dtype]
    assert float((out.double() - expected).norm() / expected.norm()) < limit
    assert float((lse.double() - expected_lse).abs().max()) < 1e-4


def test_large_half_precision_queries_do_not_overflow(qkv):
    q, k, v = qkv(1, 1, 1, 128, 256, 64, torch.float16)
    q, k = (q * 2e4).clamp(-6e4, 6e4), k * 1e-5
    layout = random_layout((1, 1), 128, 256, 64, 64, 0.6)
    expected, _ = block_sparse_reference(q.double(), k.double(), v.double(), layout, scale=1.0)
    out = block_sparse_attention(q, k, v, layout, scale=1.0)
    assert float((out.double() - expected).norm() / expected.norm()) < 1e-3


@pytest.mark.parametrize("poisoned", ["k", "v"])
def test_keys_that_no_row_of_a_partial_block_keeps_are_never_used(unused_keys, poisoned):
    *qkv, layout, unused = unused_keys(poisoned, D=16)
    expected, _ = block_sparse_reference(*(x.nan_to_num() for x in qkv), layout)
    q, k, v = (x.requires_grad_() for x in qkv)
    out = block_sparse_attention(q, k, v, layout)
    assert torch.allclose(out, expected, atol=1e-6)
    out.sum().backward()
    assert q.grad.isfinite().all()
    for x in (k, v):
        assert x.grad.transpose(1, 2)[~unused].isfinite().all()
