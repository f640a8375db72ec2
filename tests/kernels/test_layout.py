"""BlockLayout: constructors, selection rules, conversions and validation."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchkit.kernels import BlockLayout, ElementRule, LayoutError, block_mass, dense_attention

SIZES = {"block_q": 64, "block_k": 64, "q_len": 300, "kv_len": 500}


def stable_topk(W, k):
    """The rule spelled out: sort by mass, equal masses by index, keep the first k."""
    order = torch.sort(W, dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(W, dtype=torch.bool).scatter_(-1, order[..., :k], True)


def test_bool_round_trip_and_figures():
    keep = torch.rand(2, 3, 5, 8, generator=torch.Generator().manual_seed(0)) < 0.4
    keep[0, 0, 1], keep[1, 2, 3] = True, False
    layout = BlockLayout.from_bool(keep, **SIZES)
    assert torch.equal(layout.to_bool(), keep)
    assert layout.kv_idx.dtype == torch.int16
    assert layout.density() == pytest.approx(float(keep.float().mean()))
    assert layout.flops(64) == 4 * 64 * 64 * 64 * int(keep.sum())
    assert BlockLayout.from_bool(keep[:1, :1], **SIZES).flops(64, 2, 4) == 8 * 4 * 64**3 * int(keep[0, 0].sum())
    assert layout.nbytes() == 2 * layout.kv_idx.numel() + 4 * layout.kv_num.numel()
    assert torch.equal(BlockLayout.from_bits(layout.to_bits(), **SIZES).to_bool(), keep)
    assert torch.equal(layout.to("cpu").to_bool(), keep)
    lengths = layout.listed.flatten()[layout.order.long()]
    assert bool((lengths[1:] <= lengths[:-1]).all())


def test_complete_rows_take_no_room():
    keep = torch.zeros(1, 1, 5, 8, dtype=torch.bool)
    keep[..., :2] = True
    keep[..., 4, :] = True
    layout = BlockLayout.from_bool(keep, **SIZES)
    assert layout.kv_idx.shape[-1] == 2
    assert layout.kv_num.flatten().tolist() == [2, 2, 2, 2, 8]
    assert torch.equal(layout.to_bool(), keep)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), k=st.integers(0, 9), levels=st.sampled_from([1, 2, 5, 1000]))
def test_topk_is_optimal_and_ties_go_low(seed, k, levels):
    g = torch.Generator().manual_seed(seed)
    W = torch.randint(0, levels, (2, 2, 5, 8), generator=g).float()
    kept = BlockLayout.from_topk(W, k, **SIZES).to_bool()
    assert torch.equal(kept, stable_topk(W, k))
    other = torch.rand(W.shape, generator=g).argsort(-1) < min(k, 8)  # any other set of the same size
    assert bool(((W * kept).sum(-1) >= (W * other).sum(-1)).all())


def test_topk_budgets_per_head_and_forced_blocks():
    W = torch.rand(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    k = torch.tensor([[1, 2, 3], [3, 2, 1]])
    forced = torch.zeros(5, 8, dtype=torch.bool)
    forced[:, 7], forced[4] = True, True  # a text column and a text row
    layout = BlockLayout.from_topk(W, k, forced, **SIZES)
    kept = layout.to_bool()
    assert bool((kept | ~forced).all())
    free = kept & ~forced
    assert torch.equal(free[..., :4, :].sum(-1), k[:, :, None].expand(2, 3, 4))
    assert torch.equal(kept[..., :4, :7], stable_topk(W[..., :7], 3)[..., :4, :] & kept[..., :4, :7])
    assert layout.kv_idx.shape[-1] == 4  # the text row is implicit
    assert torch.equal(BlockLayout.from_topk(W, 2, **SIZES).to_bool().sum(-1), torch.full((2, 3, 5), 2))


def test_topk_never_keeps_nan_first_or_blocks_past_the_end():
    W = torch.rand(2, 1, 5, 8, generator=torch.Generator().manual_seed(0))
    W[..., 0] = float("nan")
    W[..., 6] = 9.0
    layout = BlockLayout.from_topk(W, 3, kv_lens=torch.tensor([500, 250]), **SIZES)
    kept = layout.to_bool()
    assert not kept[..., 0].any()
    assert kept[0, ..., 6].all()
    assert not kept[1, ..., 4:].any()


def test_topk_takes_text_rows_lengths_and_budgets_together():
    W = torch.randint(0, 4, (2, 3, 5, 8), generator=torch.Generator().manual_seed(0)).float()
    W[1, :, :, 2] = float("nan")
    k = torch.tensor([[0, 2, 9], [3, 1, 4]])
    forced = torch.zeros(2, 1, 5, 8, dtype=torch.bool)
    forced[:, :, :, 3], forced[:, :, 2] = True, True
    layout = BlockLayout.from_topk(W, k, forced, kv_lens=torch.tensor([500, 250]), **SIZES)
    valid = torch.arange(8) < torch.tensor([8, 4]).view(2, 1, 1, 1)
    must = forced & valid
    score = W.nan_to_num(nan=-1).masked_fill(~valid | must, -2)
    free = (valid & ~must).sum(-1)
    for b, h, p in [(b, h, p) for b in range(2) for h in range(3) for p in range(5)]:
        best = stable_topk(score[b, h, p], min(int(k[b, h]), int(free[b, 0, p])))
        assert torch.equal(layout.to_bool()[b, h, p], best | must[b, 0, p])
    assert layout.kv_idx.shape[-1] == 3  # rows that keep all their blocks take no room
    rows = layout.kv_num == layout.valid_blocks
    assert not layout.kv_idx[rows].any()


@pytest.mark.parametrize("lens", [False, True])
@pytest.mark.parametrize("table", [False, True])
def test_topk_reads_nothing_from_an_accelerator(lens, table):
    """A meta tensor has no values: whatever read one would raise."""
    W = torch.empty(2, 3, 5, 8, device="meta")
    k = torch.empty(2, 3, device="meta", dtype=torch.int32) if table else 3
    kv_lens = torch.empty(2, device="meta", dtype=torch.int64) if lens else None
    layout = BlockLayout.from_topk(W, k, k_max=3, kv_lens=kv_lens, **SIZES)
    assert layout.kv_idx.shape == (2, 3, 5, 3)
    assert layout.kv_num.shape == (2, 3, 5)
    layout.validate()  # taken as sound
    assert BlockLayout.from_topk(W, 8, **SIZES).kv_idx.shape[-1] == 1  # everything is kept


def test_a_bound_shortens_budgets():
    W = torch.rand(5, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(BlockLayout.from_topk(W, 5, k_max=3, **SIZES).to_bool()[0, 0], stable_topk(W, 3))


def test_kept_mass_is_the_recall():
    q, k = (torch.randn(1, 2, n, 64, generator=torch.Generator().manual_seed(n)) for n in (300, 500))
    _, lse = dense_attention(q, k, k, return_lse=True)
    W = block_mass(q, k, lse, 64, 64)
    full = BlockLayout.from_topk(W, 8, **SIZES)
    assert torch.allclose(full.kept_mass(W), torch.ones(1, 2))
    some = BlockLayout.from_topk(W, 3, **SIZES)
    assert torch.allclose(some.kept_mass(W), (W * some.to_bool()).sum((-1, -2)) / W.sum((-1, -2)))


def test_selection_ignores_an_lse_shift_per_query_block():
    q, k = (torch.randn(1, 2, n, 64, generator=torch.Generator().manual_seed(n)) for n in (300, 500))
    _, lse = dense_attention(q, k, k, return_lse=True)
    shift = torch.randn(5, generator=torch.Generator().manual_seed(9)).repeat_interleave(64)[:300]
    masks = [BlockLayout.from_topk(block_mass(q, k, x, 64, 64), 3, **SIZES).to_bool() for x in (lse, lse + shift)]
    assert torch.equal(*masks)


def test_mass_beats_pooled_selection_on_adversarial_input():
    """Block means are zero but for one large token pair: pooled scores see nothing, the mass does."""
    q, k = torch.zeros(1, 1, 256, 64), torch.zeros(1, 1, 512, 64)
    g = torch.Generator().manual_seed(0)
    for p, j in enumerate([5, 2, 7, 0]):
        x = torch.randn(64, generator=g) * 3
        q[0, 0, 64 * p], q[0, 0, 64 * p + 1] = x, -x
        k[0, 0, 64 * j], k[0, 0, 64 * j + 1] = x, -x
    _, lse = dense_attention(q, k, k, return_lse=True)
    W = block_mass(q, k, lse, 64, 64)
    sizes = {"block_q": 64, "block_k": 64, "q_len": 256, "kv_len": 512}
    exact = BlockLayout.from_topk(W, 1, **sizes)
    pooled = q.unflatten(2, (4, 64)).mean(3) @ k.unflatten(2, (8, 64)).mean(3).mT
    assert float(exact.kept_mass(W)) > float(BlockLayout.from_topk(pooled, 1, **sizes).kept_mass(W))
    assert exact.kv_idx.flatten().tolist() == [5, 2, 7, 0]


def test_predicate_states_and_rule():
    sizes = {"block_q": 64, "block_k": 64, "q_len": 256, "kv_len": 256}
    layout = BlockLayout.from_predicate(lambda p, j: (j < p).int() * 2 + (j == p), rule=ElementRule(0), **sizes)
    assert torch.equal(layout.element_mask()[0, 0], torch.ones(256, 256).tril().bool())
    assert torch.equal(
        layout.element_mask(),
        BlockLayout.from_predicate(lambda p, j: j <= p, rule=ElementRule(0), **sizes).element_mask(),
    )
    assert layout.part_mask == "causal"
    with pytest.raises(LayoutError, match="rule"):
        BlockLayout.from_predicate(lambda p, j: (j == p).int(), **sizes)


def test_segments_classify_blocks_exactly():
    seg = torch.arange(300) // 128
    layout = BlockLayout.from_segments(seg, seg, block_q=64, block_k=64)
    assert torch.equal(layout.element_mask()[0, 0], seg[:, None] == seg)
    assert layout.part_num is None  # the borders fall on block borders
    ragged = torch.stack([torch.arange(300) // 100, (torch.arange(300) // 70).masked_fill(torch.arange(300) > 250, -1)])
    layout = BlockLayout.from_segments(ragged, ragged, block_q=64, block_k=64, causal_offset=0)
    expected = (ragged[:, :, None] == ragged[:, None]) & (ragged >= 0)[:, :, None] & torch.ones(300, 300).tril().bool()
    assert torch.equal(layout.element_mask()[:, 0], expected)
    assert layout.part_mask == "causal+segments"


@pytest.mark.parametrize("case", ["plain", "causal", "kv_lens"])
def test_flex_round_trip(case):
    keep = torch.rand(2, 2, 3, 4, generator=torch.Generator().manual_seed(0)) < 0.6
    rule = ElementRule(causal_offset=60) if case == "causal" else None
    lens = torch.tensor([500, 410]) if case == "kv_lens" else None
    layout = BlockLayout.from_bool(keep, block_q=128, block_k=128, q_len=300, kv_len=500, rule=rule, kv_lens=lens)
    flex = layout.to_flex()
    assert torch.equal(BlockLayout.from_flex(flex).element_mask(), layout.element_mask())


@pytest.mark.parametrize("rule", [ElementRule(causal_offset=0), None], ids=["causal", "full blocks only"])
def test_flex_attention_agrees(rule):
    from torch.nn.attention.flex_attention import flex_attention

    from patchkit.kernels import block_sparse_attention

    q, k, v = torch.randn(3, 1, 2, 256, 64, generator=torch.Generator().manual_seed(0)).unbind(0)
    keep = torch.rand(1, 2, 2, 2, generator=torch.Generator().manual_seed(0)) < 0.7
    keep[..., 0] = True
    layout = BlockLayout.from_bool(keep, block_q=128, block_k=128, q_len=256, kv_len=256, rule=rule)
    ours = block_sparse_attention(q, k, v, layout)
    assert torch.allclose(ours, flex_attention(q, k, v, block_mask=layout.to_flex()), atol=1e-5)


def test_layout_is_immutable():
    layout = BlockLayout.from_bool(torch.ones(5, 8, dtype=torch.bool), **SIZES)
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.block_q = 32


GOOD = BlockLayout.from_bool(torch.tril(torch.ones(5, 8, dtype=torch.bool), 3), **SIZES)
PART = BlockLayout.from_bool(torch.ones(5, 8, dtype=torch.bool), rule=ElementRule(causal_offset=10), **SIZES)


def _set(x, at, value):
    y = x.clone()
    y[at] = value
    return y


@pytest.mark.parametrize(
    ("base", "change", "words"),
    [
        (GOOD, {"block_k": 0}, "positive int"),
        (GOOD, {"kv_idx": _set(GOOD.kv_idx, (0, 0, 0, 3), 9)}, "past the last"),
        (GOOD, {"q_len": 100}, "Nq"),
        (GOOD, {"kv_num": GOOD.kv_num.long()}, "int64"),
        (GOOD, {"kv_num": _set(GOOD.kv_num, (0, 0, 0), 9)}, "outside"),
        (GOOD, {"kv_num": _set(GOOD.kv_num, (0, 0, 0), -1)}, "outside"),
        (GOOD, {"kv_idx": _set(GOOD.kv_idx, (0, 0, 0, 1), 0)}, "ascending"),
        (GOOD, {"kv_idx": _set(GOOD.kv_idx, (0, 0, 0, 0), -2)}, "past the last"),
        (GOOD, {"kv_lens": torch.tensor([500, 100])}, "different blocks"),
        (GOOD, {"kv_lens": torch.tensor([501])}, "kv_lens"),
        (GOOD, {"causal_offset": 3}, "without partial"),
        (PART, {"part_num": None}, "come together"),
        (PART, {"causal_offset": None}, "without an element rule"),
        (PART, {"q_seg": torch.zeros(300, dtype=torch.int32)}, "come together"),
        (PART, {"part_bits": torch.zeros(1, 1, 5, 1, 64, 3, dtype=torch.int64)}, "part_bits"),
        (PART, {"part_idx": torch.zeros_like(PART.part_idx)}, r"ascending|both full"),
    ],
)
def test_validate_names_the_fault(base, change, words):
    with pytest.raises(LayoutError, match=words):
        dataclasses.replace(base, **change).validate()


def test_constructors_refuse_wrong_masks():
    for bad in (torch.ones(5, 8), torch.ones(4, 8, dtype=torch.bool), torch.ones(8, dtype=torch.bool)):
        with pytest.raises(LayoutError):
            BlockLayout.from_bool(bad, **SIZES)
    with pytest.raises(LayoutError, match="k_per_head"):
        BlockLayout.from_topk(torch.rand(5, 8), torch.tensor(0.5), **SIZES)
    with pytest.raises(LayoutError, match="forced"):
        BlockLayout.from_topk(torch.rand(5, 8), 2, torch.ones(5, 8), **SIZES)
    with pytest.raises(LayoutError, match="head sizes"):
        BlockLayout.from_topk(torch.rand(1, 2, 5, 8), torch.ones(1, 3, dtype=torch.int64), **SIZES)
