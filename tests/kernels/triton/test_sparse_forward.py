"""The Triton forward against the masked dense softmax, in Triton's interpreter (fp32 and fp16)."""

from __future__ import annotations

import pytest
import torch

from patchkit.kernels import BlockLayout, ElementRule, block_sparse_attention, choose_path
from patchkit.kernels.sparse.reference import block_sparse_reference
from patchkit.kernels.sparse.triton import pairs as triton_pairs
from patchkit.kernels.sparse.triton import table as triton_table

pytestmark = pytest.mark.usefixtures("on_triton", "nan_buffers")


def random_layout(shape, N, M, bq, bk, share=0.5, seed=1, **kw):
    g = torch.Generator().manual_seed(seed)
    keep = torch.rand(*shape, -(-N // bq), -(-M // bk), generator=g) < share
    return BlockLayout.from_bool(keep, block_q=bq, block_k=bk, q_len=N, kv_len=M, **kw)


def check(q, k, v, layout, close, close_lse, **kw):
    """The public operator takes Triton and agrees with the reference; returns its output."""
    assert choose_path(layout, q.shape[-1], q.dtype, q.device).name == "triton"
    out, lse = block_sparse_attention(q, k, v, layout, return_lse=True, **kw)
    want, want_lse = block_sparse_reference(q.float(), k.float(), v.float(), layout, kw.get("scale"))
    assert out.dtype == q.dtype
    assert out.is_contiguous()
    close(out, want)
    if q.dtype == torch.float32:
        close_lse(lse, want_lse)
    return out


GRID = [
    # B, H, Hkv, N, M, D, block_q, block_k, B', H'
    pytest.param(1, 2, 2, 63, 63, 60, 64, 16, 1, 2, id="one-short-row-d60"),
    pytest.param(2, 4, 1, 100, 133, 64, 64, 64, 2, 4, id="gqa4-ragged-both-batch-lists"),
    pytest.param(1, 1, 1, 1000, 200, 80, 128, 64, 1, 1, id="n1000-d80"),
    pytest.param(1, 4, 1, 64, 200, 128, 64, 64, 1, 4, id="d128-gqa4"),
    pytest.param(2, 3, 3, 40, 70, 64, 16, 32, 2, 1, id="small-blocks-head-shared"),
    pytest.param(1, 2, 2, 200, 300, 64, 256, 128, 1, 2, id="blocks-larger-than-the-tile"),
]


@pytest.mark.parametrize(("B", "H", "Hkv", "N", "M", "D", "bq", "bk", "Bl", "Hl"), GRID)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_equals_masked_dense(qkv, close, close_lse, B, H, Hkv, N, M, D, bq, bk, Bl, Hl, dtype):
    q, k, v = qkv(B, H, Hkv, N, M, D, dtype)
    check(q, k, v, random_layout((Bl, Hl), N, M, bq, bk), close, close_lse)


@pytest.mark.parametrize("D", [200, 256])
def test_wide_heads(qkv, close, close_lse, D):
    """Heads of up to 256 in 16 bits, as Gemma has them: full blocks and the diagonal."""
    layout = random_layout((1, 2), 63, 130, 64, 64, 0.8, rule=ElementRule(causal_offset=67))
    assert layout.part_num is not None
    check(*qkv(1, 2, 1, 63, 130, D, torch.float16), layout, close, close_lse)


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
def test_partial_blocks(qkv, close, close_lse, rule, lens):
    N, M = 100, 150
    q, k, v = qkv(2, 2, 1, N, M, 64)
    kv_lens = torch.tensor([M - 40, M]) if lens else None
    layout = random_layout((1, 2), N, M, 64, 32, 0.8, rule=RULES[rule](N, M), kv_lens=kv_lens)
    assert layout.part_num is not None
    for x in (k, v):
        if lens:
            x[0, :, M - 40 :] = float("nan")
    check(q, k, v, layout, close, close_lse)


@pytest.mark.parametrize("bk", [32, 64, 128])
def test_row_bits(qkv, close, close_lse, bk):
    N, M = 70, 200
    table = torch.rand(1, 2, N, M, generator=torch.Generator().manual_seed(3)) < 0.3
    table[..., :bk] = True
    layout = BlockLayout.from_mask_mod(
        lambda b, h, i, n: table[b, h, i, n], block_q=64, block_k=bk, q_len=N, kv_len=M, batch=1, heads=2
    )
    assert layout.part_mask == "bits"
    check(*qkv(1, 2, 2, N, M, 64), layout, close, close_lse)


def test_all_rules_at_once(qkv, close, close_lse):
    """Stored bits, a diagonal and segments together mean their conjunction."""
    from dataclasses import replace

    N = M = 128
    bits = BlockLayout.from_mask_mod(
        lambda b, h, i, n: (i * 7 + n * 3) % 5 > 0, block_q=64, block_k=64, q_len=N, kv_len=M
    )
    layout = replace(bits, causal_offset=10, q_seg=torch.arange(N) // 50, kv_seg=torch.arange(M) // 50).validate()
    check(*qkv(2, 1, 1, N, M, 64), layout, close, close_lse)


@pytest.mark.parametrize("splits", [2, 3, 100])
def test_splits(qkv, close, close_lse, splits):
    q, k, v = qkv(1, 2, 1, 100, 300, 64)
    layout = random_layout((1, 2), 100, 300, 64, 32, 0.6, rule=ElementRule(causal_offset=150))
    first = check(q, k, v, layout, close, close_lse, num_splits=splits)
    assert torch.equal(first, block_sparse_attention(q, k, v, layout, num_splits=splits))


@pytest.mark.parametrize("scale", [-0.2, 0.0, 1.5])
def test_any_scale(qkv, close, close_lse, scale):
    layout = random_layout((1, 1), 100, 130, 64, 64, 0.7, rule=ElementRule(causal_offset=20))
    check(*qkv(1, 1, 1, 100, 130, 64), layout, close, close_lse, scale=scale)


def test_large_logits(qkv, close):
    q, k, v = qkv(1, 1, 1, 64, 130, 64)
    layout = random_layout((1, 1), 64, 130, 64, 64, 0.9)
    want, _ = block_sparse_reference(q * 40, k, v, layout)
    close(block_sparse_attention(q * 40, k, v, layout), want, 2e-5)


def test_complete_rows_need_no_list(qkv, close, close_lse):
    """Text rows: complete, with an implicit list whose stored entries are garbage."""
    keep = torch.eye(5, dtype=torch.bool)
    keep[3:] = True
    layout = BlockLayout.from_bool(keep, block_q=32, block_k=32, q_len=150, kv_len=150)
    assert layout.kv_idx.shape[-1] == 1
    layout.kv_idx[..., 3:, :] = 30000
    check(*qkv(1, 2, 2, 150, 150, 64), layout, close, close_lse)


def test_empty_rows_and_samples(qkv, close, close_lse):
    q, k, v = qkv(2, 2, 2, 100, 100, 64)
    keep = torch.zeros(2, 2, 4, 4, dtype=torch.bool)
    keep[0, 1, 2, 1] = keep[1, 0, 0] = True
    layout = BlockLayout.from_bool(keep, block_q=32, block_k=32, q_len=100, kv_len=100, kv_lens=torch.tensor([100, 0]))
    for splits in (1, 2):
        check(q, k, v, layout, close, close_lse, num_splits=splits)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("D", [64, 80])
def test_dropped_keys_are_never_read(qkv, D, poison):
    N, M = 100, 200
    q, k, v = qkv(2, 1, 1, N, M, D)
    keep = torch.rand(2, 1, 2, 4, generator=torch.Generator().manual_seed(0)) < 0.7
    keep[..., 1] = False
    keep[..., 2] = True
    layout = BlockLayout.from_bool(keep, block_q=64, block_k=64, q_len=N, kv_len=M, kv_lens=torch.tensor([150, 200]))
    clean = block_sparse_attention(q, k, v, layout)
    for x in (k, v):
        x[:, :, 64:128] = poison
        x[0, :, 150:] = poison
    assert torch.equal(block_sparse_attention(q, k, v, layout), clean)


@pytest.mark.parametrize("poisoned", ["k", "v"])
def test_keys_that_no_row_of_a_partial_block_keeps_are_never_used(unused_keys, close, close_lse, poisoned):
    q, k, v, layout, _ = unused_keys(poisoned)
    out, lse = block_sparse_attention(q, k, v, layout, return_lse=True)
    want, want_lse = block_sparse_reference(q, k.nan_to_num(), v.nan_to_num(), layout)
    close(out, want)
    close_lse(lse, want_lse)


def test_poison_kept_by_another_row_stays_there(qkv):
    q, k, v = qkv(1, 1, 1, 128, 128, 64)
    keep = torch.eye(4, dtype=torch.bool)
    keep[:, 0] = keep[2, 3] = True
    layout = BlockLayout.from_bool(keep, block_q=32, block_k=32, q_len=128, kv_len=128)
    v[:, :, 96:] = float("nan")
    bad = block_sparse_attention(q, k, v, layout).isnan().any(-1)[0, 0].view(4, 32)
    assert bad.all(1).tolist() == [False, False, True, True]
    assert int(bad.sum()) == 64


def test_strided_views(close):
    x = torch.randn(2, 100, 3, 2, 64, generator=torch.Generator().manual_seed(0))
    q, k, v = x.unbind(2)  # (B, N, H, D) slices of one fused projection
    layout = random_layout((2, 1), 100, 100, 64, 64)
    want, _ = block_sparse_reference(*(y.transpose(1, 2) for y in (q, k, v)), layout)
    out = block_sparse_attention(q, k, v, layout, layout_fmt="BNHD")
    close(out.transpose(1, 2), want)


def test_two_runs_are_bit_equal(qkv):
    q, k, v = qkv(1, 2, 1, 100, 200, 64)
    layout = random_layout((1, 2), 100, 200, 64, 32, 0.6)
    for splits in (1, 3):
        runs = [block_sparse_attention(q, k, v, layout, return_lse=True, num_splits=splits) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    # A grid of other programs gives the same rows: nothing depends on who runs when.
    alone = BlockLayout.from_bool(layout.to_bool()[:, 1:], block_q=64, block_k=32, q_len=100, kv_len=200)
    assert torch.equal(block_sparse_attention(q[:, 1:], k, v, alone), block_sparse_attention(q, k, v, layout)[:, 1:])


@pytest.fixture
def pairs_always(monkeypatch):
    monkeypatch.setattr(triton_pairs, "PAIR_BLOCKS", 0)
    monkeypatch.setattr(triton_pairs, "PAIR_OVERLAP", 0.0)


PAIRED = [
    # B, H, Hkv, N, M, D, block_k, B', H', kv_lens, splits
    pytest.param(1, 2, 1, 128, 128, 64, 64, 1, 2, None, 1, id="even"),
    pytest.param(2, 2, 2, 170, 133, 64, 64, 2, 1, [133, 70], 1, id="odd-rows-per-sample-lists"),
    pytest.param(1, 2, 1, 128, 200, 80, 32, 1, 2, None, 2, id="d80-two-splits"),
    pytest.param(2, 1, 1, 100, 128, 128, 128, 1, 1, [128, 0], 1, id="d128-an-empty-sample"),
]


@pytest.mark.parametrize(("B", "H", "Hkv", "N", "M", "D", "bk", "Bl", "Hl", "lens", "splits"), PAIRED)
def test_pairs(qkv, close, close_lse, pairs_always, B, H, Hkv, N, M, D, bk, Bl, Hl, lens, splits):
    """Shared and own blocks in two launches: the same result, whatever neighbours share."""
    q, k, v = qkv(B, H, Hkv, N, M, D)
    kv_lens = None if lens is None else torch.tensor(lens)
    layout = random_layout((2 if lens else Bl, Hl), N, M, 64, bk, 0.7, kv_lens=kv_lens)
    assert triton_pairs.pairs_of(layout) is not None
    check(q, k, v, layout, close, close_lse, num_splits=splits)


def test_pairs_with_partial_blocks_complete_and_empty_rows(qkv, close, close_lse, pairs_always):
    N, M = 370, 200
    keep = torch.zeros(6, 7, dtype=torch.bool)
    keep[0, 1:4] = keep[1, 2:6] = True  # overlapping
    keep[2:4] = True  # two complete rows (as far as the rule lets them be)
    keep[4] = True  # one complete row beside an empty one
    rule = ElementRule(causal_offset=150)
    q, k, v = qkv(1, 1, 1, N, M, 64)
    for r in (None, rule):
        layout = BlockLayout.from_bool(keep, block_q=64, block_k=32, q_len=N, kv_len=M, rule=r)
        check(q, k, v, layout, close, close_lse)


def test_pairs_sort_the_lists_apart(pairs_always):
    keep = torch.rand(2, 2, 7, 9, generator=torch.Generator().manual_seed(5)) < 0.6
    keep[0, 0, 2:4] = keep[0, 0, 5] = keep[1, 1, 6] = True
    layout = BlockLayout.from_bool(keep, block_q=64, block_k=16, q_len=440, kv_len=140, kv_lens=torch.tensor([140, 70]))
    pairs = triton_pairs.pairs_of(layout)
    for part in pairs:
        part.validate()
    shared = pairs.shared.to_bool().repeat_interleave(2, 2)[:, :, :7]
    own, whole = pairs.own.to_bool(), layout.to_bool()
    assert not bool((shared & own).any())
    assert torch.equal(shared | own, whole)
    other = torch.nn.functional.pad(whole, (0, 0, 0, 1)).unflatten(2, (4, 2)).flip(3).flatten(2, 3)[:, :, :7]
    both = whole & other
    beside = layout.kv_num == layout.valid_blocks
    beside = torch.nn.functional.pad(beside, (0, 1)).unflatten(2, (4, 2)).sum(-1).repeat_interleave(2, 2)[:, :, :7] == 1
    assert torch.equal(shared[~beside], both[~beside])


def test_pairs_are_used_where_they_save_reads():
    def banded(shift):
        p, j = torch.arange(40).view(-1, 1), torch.arange(40).view(1, -1)
        keep = (j - p * shift).remainder(40) < 30
        return BlockLayout.from_bool(keep, block_q=64, block_k=64, q_len=2560, kv_len=2560)

    assert triton_pairs.pairs_of(banded(1)) is not None
    assert triton_pairs.pairs_of(random_layout((1, 1), 2560, 2560, 64, 64, 0.1)) is None  # short lists, little shared
    assert triton_pairs.pairs_of(random_layout((1, 1), 2560, 2560, 128, 64, 0.9)) is None
    assert triton_pairs.pairs_of(random_layout((1, 1), 64, 2560, 64, 64, 0.9)) is None


@pytest.mark.parametrize("paired", [False, True])
def test_dropped_keys_stay_out_of_pairs(qkv, pairs_always, monkeypatch, paired):
    """A block that one row of a pair keeps must not reach the other, which drops it."""
    if not paired:
        monkeypatch.setattr(triton_pairs, "PAIR_OVERLAP", 2.0)
    q, k, v = qkv(1, 1, 1, 128, 192, 64)
    keep = torch.tensor([[1, 1, 0], [1, 0, 0]], dtype=torch.bool)
    layout = BlockLayout.from_bool(keep, block_q=64, block_k=64, q_len=128, kv_len=192)
    assert (triton_pairs.pairs_of(layout) is not None) == paired
    v[:, :, 64:] = float("nan")
    bad = block_sparse_attention(q, k, v, layout).isnan().any(-1)[0, 0]
    assert bad.tolist() == [True] * 64 + [False] * 64


def test_launch_order():
    """Complete rows first, then the heads by falling length, rows ascending."""
    from patchkit.kernels.sparse.triton.launch import work_order

    keep = torch.zeros(1, 2, 4, 5, dtype=torch.bool)
    keep[0, 0, :, 0] = True
    keep[0, 1, :, :2] = True
    keep[0, :, 3] = True
    layout = BlockLayout.from_bool(keep, block_q=16, block_k=16, q_len=64, kv_len=80)
    order = work_order(layout, 2, 2)  # two samples share the layout
    assert order.dtype == torch.int32
    assert order.tolist() == [7, 15, 3, 11, 4, 5, 6, 12, 13, 14, 0, 1, 2, 8, 9, 10]


def test_other_blocks_and_dtypes_run_blocked(qkv, close):
    q, k, v = qkv(1, 1, 1, 100, 100, 64)
    odd = random_layout((1, 1), 100, 100, 48, 64)
    path = choose_path(odd, 64, torch.float32)
    assert path.name == "blocked"
    close(block_sparse_attention(q, k, v, odd), block_sparse_reference(q, k, v, odd)[0])
    from patchkit.kernels.sparse.plan import triton_obstacle

    fine = random_layout((1, 1), 100, 100, 64, 64)
    cpu = torch.device("cpu")
    assert "block_q is 48" in triton_obstacle(odd, 64, torch.float32, cpu)
    assert "float64" in triton_obstacle(fine, 64, torch.float64, cpu)
    assert "D is 257" in triton_obstacle(fine, 257, torch.float16, cpu)
    assert triton_obstacle(fine, 256, torch.float16, cpu) is None
    triton_table.LARGEST_D[4] = 64
    assert "in torch.float32" in triton_obstacle(fine, 80, torch.float32, cpu)


def test_a_call_reads_no_tensor_on_the_host(qkv, monkeypatch):
    """After the first call with a layout nothing waits for the device: no value is read, no list is made anew."""
    q, k, v = qkv(1, 2, 2, 64, 64, 64)
    layout = random_layout((1, 2), 64, 64, 16, 64, 0.6, kv_lens=torch.tensor([60]))
    block_sparse_attention(q, k, v, layout)
    whole = random_layout((1, 1), 64, 64, 16, 64, 2, kv_lens=torch.tensor([60]))
    block_sparse_attention(q, k, v, whole)

    def refuse(self, *args):
        raise AssertionError("a value was read on the host")

    with monkeypatch.context() as m:
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "nonzero", "cpu"):
            m.setattr(torch.Tensor, name, refuse)
        m.setattr("patchkit.kernels.sparse.triton.launch.forward_kernel", Quiet())
        block_sparse_attention(q, k, v, layout)
        block_sparse_attention(q, k, v, whole)


class Quiet:
    """A kernel that does nothing."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None
