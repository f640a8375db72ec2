"""The measuring of attention: what is compared with what, and that wrong results are found."""

from __future__ import annotations

import pytest
import torch

from patchkit.kernels import BlockLayout, ElementRule, KernelValueError, block_sparse_attention
from patchkit.kernels.bench import MODELS, Bench, Shape, time_calls
from patchkit.kernels.bench import measure as measuring
from patchkit.kernels.bench.accuracy import allowed_pairs, sampled_error
from patchkit.kernels.bench.patterns import density_of, layout_of, masses

SMALL = Shape("small", tokens=300, heads=2, head_dim=32, text=30, frame=60)
CAUSAL = Shape("causal", tokens=300, heads=4, head_dim=32, kv_heads=2, causal=True)
CPU = torch.device("cpu")


def layouts():
    g = torch.Generator().manual_seed(0)
    sizes = {"block_q": 64, "block_k": 32, "q_len": 200, "kv_len": 230}
    keep = torch.rand(2, 2, 4, 8, generator=g) < 0.5
    seg = torch.arange(230) // 50
    yield "ragged", BlockLayout.from_bool(keep, **sizes)
    yield "causal", BlockLayout.from_bool(keep, rule=ElementRule(causal_offset=30), **sizes)
    yield "segments", BlockLayout.from_bool(keep, rule=ElementRule(None, seg[:200], seg), **sizes)
    yield "padding", BlockLayout.from_bool(keep, kv_lens=torch.tensor([230, 99]), **sizes)
    yield "bits", BlockLayout.from_mask_mod(lambda b, h, q, k: (q + k * (h + 1)) % 7 < 3, heads=2, **sizes)


@pytest.mark.parametrize(("name", "layout"), list(layouts()), ids=[name for name, _ in layouts()])
def test_sampled_rows_see_what_the_layout_says(name, layout):
    mask = layout.element_mask()
    for b in range(mask.shape[0]):
        for p in range(layout.n_q):
            rows = mask[b, 1, p * 64 : (p + 1) * 64]
            assert torch.equal(allowed_pairs(layout, b, 1, p), rows)


@pytest.mark.parametrize("shape", [SMALL, CAUSAL], ids=lambda s: s.name)
def test_a_wrong_result_has_an_error(shape, qkv):
    q, k, v = qkv(1, shape.heads, shape.shared_heads, shape.length, shape.length, shape.head_dim)
    layout = layout_of(shape, 64, masses(shape, 64, "random", CPU), 0.4)
    out = block_sparse_attention(q, k, v, layout)
    assert sampled_error(out, q, k, v, layout) < 1e-6
    assert sampled_error(out * 1.01, q, k, v, layout) == pytest.approx(0.01, rel=1e-3)
    assert sampled_error(out, q, k, v, None, shape.causal) > 0.1  # dense is another result
    out[:, :, -1] = float("nan")
    assert sampled_error(out, q, k, v, layout) == float("inf")


@pytest.mark.parametrize("pattern", ["random", "video"])
@pytest.mark.parametrize("name", MODELS)
def test_layouts_have_the_density_that_was_asked_for(name, pattern):
    shape = MODELS[name].smaller(tokens=4096, heads=2)
    block = 64
    layout = layout_of(shape, block, masses(shape, block, pattern, CPU), 0.25)
    n = layout.n_q
    if shape.causal:
        assert density_of(shape, layout) == pytest.approx(0.25, abs=0.01)
        assert layout.part_mask == "causal"
        assert (layout.part_num == 1).all()  # the diagonal
    else:
        video = shape.tokens // block if shape.text else n
        expected = (round(0.25 * video) * video + n * n - video * video) / n**2
        assert density_of(shape, layout) == pytest.approx(expected)
    full = layout_of(shape, block, masses(shape, block, pattern, CPU), 1.0)
    assert density_of(shape, full) == 1.0


def test_video_maps_have_two_kinds_of_heads():
    shape = Shape("video", tokens=2048, heads=2, head_dim=32, frame=256)
    keep = layout_of(shape, 32, masses(shape, 32, "video", CPU), 0.15).to_bool()[0]
    row = 20  # block 4 of frame 2: eight blocks a frame
    spatial, temporal = keep[0, row].nonzero().flatten(), keep[1, row].nonzero().flatten()
    assert (spatial - row).abs().max() < 16
    assert {int(j) for j in temporal} >= {4, 12, 20, 28}
    with pytest.raises(KernelValueError, match="no pattern 'x'"):
        masses(shape, 32, "x", CPU)


def test_a_row_says_everything():
    row = Bench(SMALL, torch.float32, "cpu", seconds=0.0).row(block=32, density=0.3)
    assert row["passed"]
    assert row["error"] < 1e-6
    assert (row["path"], row["dense"], row["tokens"], row["text"]) == ("blocked", "torch", 300, 30)
    assert row["retention"] == pytest.approx(row["density"] * row["dense_ms"] / row["sparse_ms"], rel=0.02)
    assert row["search_over_dense"] == pytest.approx((row["mass_ms"] + row["layout_ms"]) / row["dense_ms"], rel=0.02)
    assert row["calls"] == 3
    assert row["mass_bytes"] == 4 * 2 * 11 * 11
    assert row["prepare_ms"] >= 0
    assert "form" not in row


def test_pairs_of_rows_are_measured_beside_single_ones(monkeypatch):
    """Which form runs is decided from the layout alone, so a CPU can tell; its calls are the blocked path's."""
    chosen = measuring.choose_path
    monkeypatch.setattr(measuring, "choose_path", lambda *a: chosen(*a)._replace(name="triton"))
    long = Shape("long", tokens=64 * 64, heads=1, head_dim=16)
    bench = Bench(long, torch.float32, "cpu", seconds=0.0)
    half, few = bench.row(density=0.9), bench.row(density=0.05)
    assert (half["form"], few["form"]) == ("pair", "single")
    assert half["single_ms"] > 0
    assert "single_ms" not in few


def test_a_wrong_operator_does_not_pass(monkeypatch):
    bench = Bench(SMALL, torch.float32, "cpu", seconds=0.0)
    monkeypatch.setattr(measuring, "block_sparse_attention", lambda q, k, v, layout, **options: torch.zeros_like(q))
    assert not bench.row(block=32, density=0.3)["passed"]


def test_flex_that_is_wrong_or_missing_is_named(monkeypatch):
    bench = Bench(SMALL, torch.float32, "cpu", seconds=0.0, flex=True)
    monkeypatch.setattr(measuring, "flex_call", lambda q, k, v, layout: lambda: torch.zeros_like(q))
    assert "wrong: relative RMS error 1.0e+00" in bench.row(block=64, density=0.3)["flex"]

    def refuse(*args):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(measuring, "flex_call", refuse)
    assert bench.row(block=64, density=0.3)["flex"] == "not here: no compiler"


def test_dense_kernels_that_are_wrong_are_not_compared_with(monkeypatch):
    monkeypatch.setattr(measuring, "dense_calls", lambda q, k, v, causal: {"bad": lambda: q * 0, "none": lambda: None})
    with pytest.raises(KernelValueError, match="bad wrong: relative RMS error"):
        Bench(SMALL, torch.float32, "cpu", seconds=0.0)


@pytest.mark.parametrize("sizes", [{"tokens": 0}, {"heads": 3, "kv_heads": 2}, {"text": -1}, {"head_dim": 0}])
def test_impossible_shapes(sizes):
    with pytest.raises(KernelValueError, match="Shape:"):
        Shape(**{"name": "x", "tokens": 100, "heads": 2, "head_dim": 32} | sizes)


def test_calls_take_turns_and_the_median_counts():
    order = []
    found = time_calls({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, "cpu", seconds=0.0)
    assert "".join(order) == "ab" * 5  # one that compiles, one that tells how long, three that count
    assert found["a"].calls == 3
    assert found["a"].low <= found["a"].ms <= found["a"].high
