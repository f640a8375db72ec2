"""AdaSpa against its formulas, one attention op at a time."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from patchkit.context import AttentionCall, Moment, Span
from patchkit.errors import InvalidOption
from patchkit.ledger import Ledger
from patchkit.recipes.adaspa import AdaSpa
from patchkit.sites import Site


def dense(call):
    """The model's own op."""
    return F.scaled_dot_product_attention(
        call.q, call.k, call.v, attn_mask=call.mask, is_causal=call.causal, scale=call.scale
    )


class Op:
    """One attention module inside a run: keeps a state and a ledger per guidance branch, as the mechanism does."""

    def __init__(self, recipe, heads=4, kind="self", side=None, terminal=dense, total=50):
        self.recipe, self.total = recipe, total
        self.site = Site("transformer", "blocks.0.attn1", torch.nn.Identity(), kind, 0, heads, side)
        self.site.terminal = terminal
        self.states, self.ledgers = {}, {}

    def __call__(self, q, k, v, step, *, mask=None, text=None, branch="cond", scale=None, causal=False, index=0):
        key = branch, index
        call = AttentionCall(
            q, k, v, mask, scale, causal, self.site, index, text=text, moment=Moment(step, self.total, branch)
        )
        call.state = self.states.setdefault(key, {})
        call.ledger = self.ledgers.setdefault(key, Ledger())
        return self.recipe.attend(call, self.site.terminal)

    def state(self, branch="cond"):
        return self.states[branch, 0]

    def ledger(self, branch="cond"):
        return self.ledgers[branch, 0]


def small(**options):
    """A recipe for short sequences: warm-up of one step, no second search unless asked for."""
    return AdaSpa(**{"min_tokens": 0, "block_size": 16, "warmup_steps": 1, "search_steps": [], **options})


def qkv(tokens=96, heads=4, batch=1, dim=16, seed=0, spread=2.0):
    """Peaked attention, differently peaked per head, so that blocks and heads differ."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, heads, tokens, dim, generator=g) for _ in range(3))
    sharp = torch.linspace(0.3, spread, heads)[None, :, None, None]
    return q * sharp, k, v


def block_masses(q, k, lse, block, valid=None):
    """W as the formula reads: (B, H, Nq, Nk)."""
    p = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 - lse[..., None]).exp()
    if valid is not None:
        p = p * valid[:, None, None, :] * valid[:, None, :, None]
    bq, bk = block
    pad = F.pad(p, (0, -p.shape[-1] % bk, 0, -p.shape[-2] % bq))
    return pad.unflatten(-1, (-1, bk)).sum(-1).unflatten(-2, (-1, bq)).sum(-2)


def logsumexp(q, k, valid=None):
    s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return (s if valid is None else s.masked_fill(~valid[:, None, None, :], -math.inf)).logsumexp(-1)


def text_blocks(tokens, block, text):
    count = -(-tokens // block)
    touched = torch.zeros(count, dtype=torch.bool)
    if text is not None:
        for token in range(*text):
            touched[token // block] = True
    return touched


def reference_mask(mass, text, tokens, block, density, threshold=0.8, key_text=None):
    """Kept blocks (B, H, Nq, Nk) by sections 2.3 to 2.6 of the method, with plain loops."""
    rows, columns = text_blocks(tokens, block[0], text), text_blocks(tokens, block[1], key_text or text)
    video = (~columns).nonzero()[:, 0]

    def keep(b, h, d):
        k = max(1, round(d * len(video)))
        kept = columns.repeat(len(rows), 1)
        kept[rows] = True
        for p in range(len(rows)):
            best = sorted(video.tolist(), key=lambda j: (-float(mass[b, h, p, j]), j))[:k]
            kept[p, best] = True
        return kept

    batch, heads = mass.shape[:2]
    out = torch.zeros_like(mass, dtype=torch.bool)
    for b in range(batch):
        recall = [float((mass[b, h] * keep(b, h, density)).sum() / mass[b, h].sum()) for h in range(heads)]
        order = sorted(range(heads), key=lambda h: (-recall[h], h))
        n = min(sum(r > threshold for r in recall), heads // 2)
        levels = dict.fromkeys(order, density)
        levels |= dict.fromkeys(order[:n], density / 2) | dict.fromkeys(order[heads - n :], 1.5 * density)
        for h in range(heads):
            out[b, h] = keep(b, h, levels[h])
    return out


def expand(mask, block, tokens):
    return mask.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)[..., :tokens, :tokens]


def close(a, b, tolerance=1e-5):
    return torch.allclose(a, b, atol=tolerance, rtol=tolerance)


# --- oracle 1: density 1 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [None, Span(0, 10), Span(86, 96)], ids=["video", "text-first", "text-last"])
@pytest.mark.parametrize("block", [16, 20, (32, 16)])
def test_everything_kept_equals_dense(text, block):
    op = Op(small(density=1.0, block_size=block), total=4)
    for step in range(4):
        q, k, v = qkv(seed=step, batch=2)
        out = op(q, k, v, step, text=text)
        assert close(out, F.scaled_dot_product_attention(q, k, v))
    ledger = op.ledger()
    assert ledger.counts["sparse"] == 3
    assert torch.equal(ledger.values["actual_density"], torch.ones(2, 4))
    assert close(ledger.values["recall"], torch.ones(2, 4))
    layout = op.state()["layout"]
    assert bool((layout.kv_num == -(-96 // op.recipe.blocks[1])).all())


# --- oracle 2: dense outputs are the model's own ------------------------------------------------------------------


def math_attention(call):
    """An op of other bits than torch's fused one."""
    s = call.q @ call.k.transpose(-1, -2) * call.q.shape[-1] ** -0.5
    if call.mask is not None:
        s = s.masked_fill(~call.mask, -math.inf)
    return s.softmax(-1) @ call.v


@pytest.mark.parametrize("terminal", [dense, math_attention])
@pytest.mark.parametrize("masked", [False, True])
def test_warm_up_and_search_outputs_have_the_bits_of_the_models_op(terminal, masked):
    op = Op(small(warmup_steps=3, density=0.3), terminal=terminal, total=8)
    mask = torch.ones(1, 1, 1, 96, dtype=torch.bool) if masked else None
    if masked:
        mask[..., 90:] = False
    for step in range(3):
        q, k, v = qkv(seed=step)
        out = op(q, k, v, step, mask=mask, text=Span(80, 96))
        wanted = terminal(AttentionCall(q, k, v, mask, None, False, op.site))
        assert torch.equal(out, wanted)
    assert op.ledger().counts["fused_search"] == 1
    q, k, v = qkv(seed=3)
    assert not close(op(q, k, v, 3, mask=mask, text=Span(80, 96)), F.scaled_dot_product_attention(q, k, v))


def test_the_search_step_costs_one_dense_pass_where_the_kernel_is_the_same():
    shapes = []

    def counting(call):
        shapes.append(tuple(call.q.shape))
        return dense(call)

    op = Op(small(), terminal=counting, total=8)
    op(*qkv(batch=2), 0)
    assert shapes == [(1, 1, 96, 16)]  # one head, to compare bits with; the rest came with the LSE


def test_a_recipe_inside_is_heard_at_the_search_step():
    op = Op(small(), total=8)
    calls = []

    def inner(call):  # something that touches one head only stands between us and the model's op
        calls.append(call.q.shape)
        out = dense(call)
        out[:, -1] = 0
        return out

    q, k, v = qkv()
    call = AttentionCall(q, k, v, None, None, False, op.site, moment=Moment(0, 8), ledger=Ledger())
    out = op.recipe.attend(call, inner)
    assert bool((out[:, -1] == 0).all())
    assert calls == [q.shape]


# --- oracles 3, 9 and 10: masses, LSE, the sparse op --------------------------------------------------------------


@pytest.mark.parametrize("text", [None, Span(0, 10), Span(91, 101)], ids=["video", "text-first", "text-last"])
@pytest.mark.parametrize("block", [(16, 16), (32, 16)])
@pytest.mark.parametrize("density", [0.2, 0.5])
def test_follows_the_formulas_over_a_run(text, block, density):
    tokens = 101  # no multiple of any block
    op = Op(small(density=density, block_size=block, search_steps=[3], recall_threshold=0.5), total=8)
    data = [qkv(tokens, batch=2, seed=step) for step in range(8)]
    first_lse = logsumexp(*data[0][:2])
    for step, (q, k, v) in enumerate(data):
        out = op(q, k, v, step, text=text)
        if step in (0, 3):
            mask = reference_mask(block_masses(q, k, first_lse, block), text, tokens, block, density, 0.5)
        if step > 0:
            s = q @ k.transpose(-1, -2) * 16**-0.5
            wanted = s.masked_fill(~expand(mask, block, tokens), -math.inf).softmax(-1) @ v
            assert close(out, wanted), step
    assert op.ledger().counts == {"searches": 2, "fused_search": 1, "cached_search": 1, "sparse": 7}


def test_softmax_scale_reaches_search_and_sparse_op():
    op = Op(small(density=0.3), total=4)
    reference = Op(small(density=0.3), total=4)
    for step in range(3):
        q, k, v = qkv(seed=step)
        assert close(op(q, k, v, step, scale=0.5), reference(q * 0.5 * 4, k, v, step))
    assert torch.equal(op.state()["layout"].to_bool(), reference.state()["layout"].to_bool())


def test_cached_lse_is_dense_and_stays_as_it_was():
    op = Op(small(warmup_steps=2, search_steps=[4, 6], density=0.3), total=10)
    for step in range(6):
        q, k, v = qkv(seed=step)
        op(q, k, v, step)
        if step == 1:
            wanted = logsumexp(q, k)
        if step >= 1:
            assert close(op.state()["lse"], wanted)  # neither the sparse steps nor the search at 4 wrote to it


def test_refresh_makes_the_cached_lse_that_of_today():
    op = Op(small(search_steps=[2, 4], refresh_lse=True, density=0.3), total=8)
    for step in range(3):
        q, k, v = qkv(seed=step)
        op(q, k, v, step)
    assert close(op.state()["lse"], logsumexp(q, k))


def test_stale_lse_does_not_overflow():
    op = Op(small(search_steps=[1], density=0.3, refresh_lse=True), total=8)
    q, k, v = qkv()
    op(q, k, v, 0)
    out = op(q * 200, k, v, 1)  # scores hundreds above the cached LSE
    assert bool(out.isfinite().all())
    assert bool(op.ledger().values["recall"].isfinite().all())


# --- oracle 5 on the layout ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.8])
def test_every_row_of_a_head_keeps_as_many_blocks(density):
    op = Op(small(density=density), total=4)
    q, k, v = qkv(160, batch=2)
    op(q, k, v, 0, text=Span(0, 20))
    text = 2  # blocks of 16 that hold 20 tokens
    kv_num = op.state()["layout"].kv_num[:, :, text:]
    assert bool((op.state()["layout"].kv_num[:, :, :text] == 10).all())  # rows of text are complete
    assert torch.equal(kv_num, (op.state()["k_h"] + text)[..., None].expand_as(kv_num).to(kv_num.dtype))
    assert int(kv_num.min()) > text


def test_global_choice_is_uneven_and_keeps_as_much():
    q, k, v = qkv(160)
    even, uneven = Op(small(density=0.3, head_adaptive=False), total=4), None
    uneven = Op(small(density=0.3, head_adaptive=False, selection="global"), total=4)
    for op in (even, uneven):
        op(q, k, v, 0)
        op(q, k, v, 1)
    a, b = (op.state()["layout"].kv_num for op in (even, uneven))
    assert len(a.unique()) == 1
    assert len(b.unique()) > 1
    assert int(a.sum()) == int(b.sum())
    assert bool((uneven.ledger().values["recall"] >= even.ledger().values["recall"] - 1e-6).all())


# --- oracle 7: schedule -------------------------------------------------------------------------------------------


def watch(monkeypatch):
    """Count the kernels' calls."""
    from patchkit import kernels

    seen = {"block_mass": 0, "sparse": 0}

    def counting(name, what):
        original = getattr(kernels, name)

        def counted(*args, **kwargs):
            seen[what] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(kernels, name, counted)

    counting("block_mass", "block_mass")
    counting("block_sparse_attention", "sparse")
    return seen


def test_fifty_steps_by_default(monkeypatch):
    seen = watch(monkeypatch)
    op = Op(AdaSpa(min_tokens=0, block_size=16))
    exact, searches = [], []
    for step in range(50):
        for branch in ("cond", "uncond"):
            q, k, v = qkv(seed=step + 100 * (branch == "cond"))
            before = seen["block_mass"]
            out = op(q, k, v, step, branch=branch)
            if branch == "cond":
                if torch.equal(out, F.scaled_dot_product_attention(q, k, v)):
                    exact.append(step)
                if seen["block_mass"] > before:
                    searches.append(step)
    assert exact == list(range(10))
    assert searches == [9, 29]  # the paper's 10 and 30, counted from 1
    assert seen == {"block_mass": 4, "sparse": 80}
    for branch in ("cond", "uncond"):
        ledger = op.ledger(branch)
        assert ledger.counts == {"searches": 2, "fused_search": 1, "cached_search": 1, "sparse": 40}
        assert ledger.dense == {"warm-up": 10}


@pytest.mark.parametrize(
    ("options", "total", "dense_steps", "searches"),
    [
        ({}, 20, 4, [3, 11]),
        ({"warmup_steps": 0}, 50, 1, [0, 29]),
        ({"warmup_steps": 1}, 50, 1, [0, 29]),
        ({"warmup_steps": 5, "search_steps": []}, 50, 5, [4]),
        ({"search_steps": [0.2, 0.4, 0.6, 0.8]}, 50, 10, [9, 19, 29, 39]),
        ({"warmup_steps": 0, "search_steps": [0, 29]}, 50, 1, [0, 29]),
        ({"warmup_steps": 4, "search_steps": [3, 10, 30]}, 20, 4, [3, 10]),
        ({"warmup_steps": 6, "search_steps": [0.1, 0.5]}, 20, 6, [5, 9]),
        ({"warmup_steps": 4, "search_steps": [10]}, None, 4, [3, 10]),
        ({}, 4, 1, [0, 1]),
        ({"warmup_steps": 1.0}, 8, 8, []),
        ({}, 1, 1, []),
    ],
)
def test_schedules(options, total, dense_steps, searches, monkeypatch):
    seen = watch(monkeypatch)
    op = Op(AdaSpa(min_tokens=0, block_size=16, **options), total=total)
    found = []
    q, k, v = qkv()
    for step in range(total or 20):
        before = seen["block_mass"]
        op(q, k, v, step)
        if seen["block_mass"] > before:
            found.append(step)
    assert found == searches
    assert seen["sparse"] == (total or 20) - dense_steps
    assert sum(op.ledger().dense.values()) == dense_steps


def test_no_search_where_the_window_leaves_nothing_sparse():
    op = Op(AdaSpa(min_tokens=0, block_size=16, steps=(0, 10)))
    for step in range(10):
        op(*qkv(seed=step), step)
    assert op.ledger().dense == {"warm-up": 10}
    assert not op.ledger().counts


def test_the_lse_goes_at_once_if_the_window_ends_before_the_next_search():
    op = Op(AdaSpa(min_tokens=0, block_size=16, steps=(0, 29)))
    for step in range(10):
        op(*qkv(seed=step), step)
    assert "lse" not in op.state()


def test_branches_do_not_share_masks():
    op = Op(small(density=0.2), total=8)
    data = {branch: qkv(seed=seed) for seed, branch in enumerate(("cond", "uncond"))}
    for branch, (q, k, v) in data.items():
        op(q, k, v, 0, branch=branch)
    layouts = [op.state(branch)["layout"].to_bool() for branch in data]
    assert not torch.equal(*layouts)


def test_a_component_that_starts_late_searches_on_its_first_call():
    op = Op(AdaSpa(min_tokens=0, block_size=16, density=0.2))
    for step in range(25, 50):
        q, k, v = qkv(seed=step)
        out = op(q, k, v, step)
        if step == 25:
            assert torch.equal(out, F.scaled_dot_product_attention(q, k, v))
    ledger = op.ledger()
    assert ledger.counts == {"searches": 2, "fused_search": 1, "cached_search": 1, "sparse": 24}
    assert ledger.dense == {"no mask yet in the sparse phase: first search": 1}


def test_another_size_rebuilds_and_says_so():
    op = Op(small(density=0.2), total=20)
    for step in range(6):
        q, k, v = qkv(96 if step < 3 else 128, seed=step)
        out = op(q, k, v, step)
        if step == 3:
            assert torch.equal(out, F.scaled_dot_product_attention(q, k, v))
    ledger = op.ledger()
    assert ledger.counts["fused_search"] == 2
    assert ledger.dense == {"warm-up": 1, "sequence changed: new search": 1}
    assert op.state()["layout"].q_len == 128


def test_other_padding_rebuilds():
    op = Op(small(density=0.2), kind="joint", total=20)
    q, k, v = qkv()
    for step, real in enumerate((90, 90, 92, 92)):
        op(q, k, v, step, mask=(torch.arange(96) < real)[None, None, None], text=Span(80, 96))
    assert op.ledger().counts["fused_search"] == 2


def test_a_second_run_begins_with_its_own_warm_up_even_if_nobody_cleared_the_state():
    op = Op(small(warmup_steps=2, density=0.2), total=8)
    for seed in (0, 10):
        for step in range(6):
            q, k, v = qkv(seed=seed + step)
            out = op(q, k, v, step)
            if step < 2:
                assert torch.equal(out, F.scaled_dot_product_attention(q, k, v))
    assert op.ledger().counts["fused_search"] == 2


def test_samplers_that_call_twice_a_step_search_once():
    op = Op(small(warmup_steps=2, search_steps=[3, 7], density=0.2), total=8)
    for step in range(6):
        for half in range(2):
            q, k, v = qkv(seed=2 * step + half)
            out = op(q, k, v, step)
            assert torch.equal(out, F.scaled_dot_product_attention(q, k, v)) == (step < 2)
    assert op.ledger().counts == {"searches": 2, "fused_search": 1, "cached_search": 1, "sparse": 8}


def test_few_steps_are_warned_about_once(caplog):
    from patchkit.recipes.adaspa.conditions import warn_once

    warn_once.cache_clear()
    for _ in range(3):
        op = Op(AdaSpa(min_tokens=0, block_size=16), total=4)
        for step in range(4):
            op(*qkv(seed=step), step)
    assert len([r for r in caplog.records if "few-step" in r.message]) == 1
    assert "4 steps leave 3" in op.ledger().values["warning"]


# --- oracle 8: text sink and padding ------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [Span(0, 21), Span(79, 100)], ids=["first", "last"])
def test_blocks_that_touch_text_are_in_every_row(text):
    op = Op(small(density=0.05), kind="joint", total=4)
    q, k, v = qkv(100, spread=4.0)
    k[:, :, text.start : text.stop] = -q.mean()  # nothing draws the choice to the text
    op(q, k, v, 0, text=text)
    kept = op.state()["layout"].to_bool()
    touched = text_blocks(100, 16, text)
    assert bool(kept[..., touched].all())
    assert bool(kept[..., touched, :].all())
    assert not bool(kept[..., ~touched, :][..., ~touched].all(-1).any())
    q, k, v = qkv(100, seed=1)
    out = op(q, k, v, 1, text=text)
    rows = touched.repeat_interleave(16)[:100]
    wanted = F.scaled_dot_product_attention(q, k, v)
    assert close(out[:, :, rows], wanted[:, :, rows])
    assert not close(out[:, :, ~rows], wanted[:, :, ~rows])


@pytest.mark.parametrize("side", ["first", "last"])
@pytest.mark.parametrize("additive", [False, True])
def test_padded_text_contributes_nothing_and_stays_sparse(side, additive):
    tokens, words, real = 101, 21, (9, 14)
    text = Span(0, words) if side == "first" else Span(tokens - words, tokens)
    valid = torch.ones(2, tokens, dtype=torch.bool)
    for sample, count in enumerate(real):
        valid[sample, text.start + count : text.stop] = False
    mask = valid[:, None, None]
    if additive:
        mask = torch.zeros(2, 1, 1, tokens).masked_fill(~mask, torch.finfo(torch.float32).min)
    ops = [Op(small(density=0.3), kind="joint", total=4) for _ in range(2)]
    full = Op(small(density=1.0), kind="joint", total=4)
    for step in range(3):
        q, k, v = qkv(tokens, batch=2, seed=step)
        other_k, other_v = (x.masked_fill(~valid[:, None, :, None], 77.0) for x in (k, v))
        a = ops[0](q, k, v, step, mask=mask, text=text)
        b = ops[1](q, other_k, other_v, step, mask=mask, text=text)
        assert torch.equal(a, b) if step else close(a, b)
        wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None])
        assert close(full(q, k, v, step, mask=mask, text=text), wanted)
    assert ops[0].ledger().counts["sparse"] == 2
    assert ops[0].ledger().dense == {"warm-up": 1}


@pytest.mark.parametrize("side", ["first", "last"])
@pytest.mark.parametrize("real", [(7, 22), (14,)], ids=["two", "one"])
def test_padded_text_against_the_formulas(side, real):
    """Where text stands first, the keys are rolled so that text and padding come last; queries stay."""
    tokens, words, block = 101, 26, (16, 16)
    text = Span(0, words) if side == "first" else Span(tokens - words, tokens)
    valid = torch.ones(len(real), tokens, dtype=torch.bool)
    for sample, count in enumerate(real):
        valid[sample, text.start + count : text.stop] = False
    op = Op(small(density=0.3), kind="joint", total=4)
    q, k, v = qkv(tokens, batch=len(real))
    op(q, k, v, 0, mask=valid[:, None, None], text=text)

    shift = words if side == "first" else 0
    key_text, real_keys = Span(tokens - words, tokens), valid.roll(-shift, -1)
    k = k.roll(-shift, 2)
    p = (q @ k.transpose(-1, -2) * 16**-0.5 - logsumexp(q, k, real_keys)[..., None]).exp()
    p = p * real_keys[:, None, None] * valid[:, None, :, None]
    pad = F.pad(p, (0, -tokens % 16, 0, -tokens % 16))
    mass = pad.unflatten(-1, (-1, 16)).sum(-1).unflatten(-2, (-1, 16)).sum(-2)
    kept = reference_mask(mass, text, tokens, block, 0.3, key_text=key_text)
    assert close(op.ledger().values["recall"], (mass * kept).sum((-1, -2)) / mass.sum((-1, -2)))
    real_blocks = torch.tensor([-(-(75 + count) // 16) for count in real])
    computed = torch.stack([kept[b, ..., :n].sum((-1, -2)) for b, n in enumerate(real_blocks)])
    assert close(op.ledger().values["actual_density"], computed / (7 * real_blocks[:, None]))

    q, k, v = qkv(tokens, batch=len(real), seed=1)
    out = op(q, k, v, 1, mask=valid[:, None, None], text=text)
    s = (q @ k.roll(-shift, 2).transpose(-1, -2) * 16**-0.5).masked_fill(
        ~(expand(kept, block, tokens) & real_keys[:, None, None]), -math.inf
    )
    assert close(out, s.softmax(-1) @ v.roll(-shift, 2))
    # blocks past a sample's own text are not even listed
    video_row = 2 if side == "first" else 0
    listed = op.state()["layout"].kv_num[:, 0, video_row] - op.state()["k_h"][:, 0]
    assert listed.tolist() == [-(-(75 + count) // 16) - 4 for count in real]


def test_actual_density_counts_text():
    op = Op(small(density=0.25, head_adaptive=False), kind="joint", total=4)
    op(*qkv(160), 0, text=Span(144, 160))
    values = op.ledger().values
    assert torch.equal(values["density"], torch.full((1, 4), 0.25))
    k = round(0.25 * 9)
    assert close(values["actual_density"], torch.full((1, 4), (9 * (k + 1) + 10) / 100))


@pytest.mark.parametrize("adaptive", [True, False])
def test_head_adaptivity_can_be_switched_off(adaptive):
    op = Op(small(density=0.34, head_adaptive=adaptive, recall_threshold=0.0), total=4)
    op(*qkv(), 0)
    assert sorted(op.state()["k_h"].flatten().tolist()) == ([1, 1, 3, 3] if adaptive else [2] * 4)


# --- heads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", ["1-2", "0,3", "1"])
def test_heads_that_are_not_selected_stay_dense(heads):
    op = Op(small(density=0.1, heads=heads), total=4)
    chosen = {"1-2": [1, 2], "0,3": [0, 3], "1": [1]}[heads]
    rest = [h for h in range(4) if h not in chosen]
    op(*qkv(100), 0, text=Span(0, 10))
    q, k, v = qkv(100, seed=1)
    out = op(q, k, v, 1, text=Span(0, 10))
    wanted = F.scaled_dot_product_attention(q, k, v)
    assert close(out[:, rest], wanted[:, rest])
    for h in chosen:
        assert not close(out[:, h], wanted[:, h])
    values = op.ledger().values
    assert values["actual_density"].shape == (1, 4)
    assert bool((values["actual_density"][:, rest] == 1).all())
    assert bool((values["actual_density"][:, chosen] < 1).all())
    assert values["k"].shape == (1, len(chosen))
    assert values["dense_heads"] == len(rest)


def test_selected_heads_are_those_of_a_run_on_them_alone():
    some, alone = Op(small(density=0.3, heads="0,3"), total=4), Op(small(density=0.3), heads=2, total=4)
    for step in range(3):
        q, k, v = qkv(seed=step)
        a, b = some(q, k, v, step), alone(*(x[:, [0, 3]] for x in (q, k, v)), step)
        assert close(a[:, [0, 3]], b)


# --- oracles 11 and 12: memory, reasons ---------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any op gave back."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return out


def test_no_tensor_of_length_squared():
    tokens = 16384
    op = Op(AdaSpa(density=0.1, warmup_steps=1, search_steps=[1]), heads=1, total=8)
    with torch.no_grad(), Largest() as seen:
        for step in range(2):
            op(*qkv(tokens, heads=1, dim=16, seed=step), step)
    assert op.ledger().counts == {"searches": 2, "fused_search": 1, "cached_search": 1, "sparse": 1}
    assert tokens * 16 <= seen.elements < tokens * tokens / 4


def test_state_is_index_lists_and_lse_goes_with_the_last_search():
    op = Op(small(search_steps=[2], density=0.2, head_adaptive=False), total=8)
    rows = 1600 // 16
    sizes = []
    for step in range(4):
        op(*qkv(1600, heads=2, seed=step), step)
        sizes.append(op.ledger().values["lse_bytes"])
        assert ("lse" in op.state()) == (step < 2)
    assert sizes == [2 * 1600 * 4] * 2 + [0] * 2
    k = 0.2 * rows
    lists, counts = 2 * rows * k, 2 * rows
    assert op.ledger().values["layout_bytes"] == op.state()["layout"].nbytes()
    assert op.state()["layout"].nbytes() <= 1.1 * (lists * 4 + counts * 4) + 64
    kept = [x for x in op.state().values() if isinstance(x, torch.Tensor)]
    assert sum(x.nbytes for x in kept) < 1000


def test_masses_of_many_heads_come_in_parts(monkeypatch):
    from patchkit.recipes import adaspa

    q, k, v = qkv()
    layouts = []
    for limit in (64 << 20, 1):
        monkeypatch.setattr(adaspa, "MASS_BYTES", limit)
        seen = watch(monkeypatch)
        op = Op(small(density=0.3), total=4)
        op(q, k, v, 0)
        layouts.append(op.state()["layout"].to_bool())
        assert seen["block_mass"] == (1 if limit > 1 else 4)
    assert torch.equal(*layouts)


def test_the_ledger_names_the_kernels_path():
    from patchkit import kernels

    for tokens, density in ((96, 1.0), (96, 0.2), (1600, 0.2)):
        op = Op(small(density=density), heads=2, total=4)
        op(*qkv(tokens, heads=2), 0)
        path = kernels.choose_path(op.state()["layout"], 16, torch.float32, "cpu")
        assert op.ledger().values["path"] == f"{path.name}: {path.reason}"
        assert (path.name == "dense") == (density == 1.0)


@pytest.mark.parametrize(
    ("options", "arguments", "reason"),
    [
        ({"min_tokens": 4096}, {}, "below min_tokens: 96 < 4096"),
        ({}, {"causal": True}, "causal"),
        ({}, {"mask": torch.rand(1, 1, 96, 96) > 0.5}, "mask is not key padding"),
        ({}, {"mask": torch.zeros(1, 1, 1, 96).fill_(-1.0)}, "mask is not key padding"),
        ({}, {"mask": (torch.arange(96) % 7 != 3)[None, None, None], "text": Span(0, 16)}, "mask hides keys between"),
        ({}, {"mask": (torch.arange(96) < 60)[None, None, None], "text": Span(80, 96)}, "mask hides video"),
        ({}, {"text": Span(30, 40)}, "inside the video"),
        ({}, {"text": Span(2, 96)}, "free of text"),
        ({}, {"step": None}, "no step clock"),
    ],
)
def test_dense_with_a_reason(options, arguments, reason):
    op = Op(small(**options), total=4)
    for at in range(3):
        q, k, v = qkv(seed=at)
        arguments = {"step": at, **arguments}
        out = op(q, k, v, arguments["step"] and at, **{n: a for n, a in arguments.items() if n != "step"})
        call = AttentionCall(q, k, v, arguments.get("mask"), None, arguments.get("causal", False), op.site)
        assert torch.equal(out, dense(call))
    [(found, times)] = op.ledger().dense.items()
    assert reason in found
    assert times == 3
    assert not op.ledger().counts


def test_joint_attention_with_unknown_text_says_so():
    op = Op(small(), kind="joint", total=4)
    op(*qkv(), 0)
    assert "where the text stands is unknown" in next(iter(op.ledger().dense))


def test_fractions_need_a_length():
    op = Op(AdaSpa(min_tokens=0, block_size=16), total=None)
    op(*qkv(), 3)
    assert "length of the run unknown" in next(iter(op.ledger().dense))


def test_gradients_run_dense():
    q, k, v = (x.requires_grad_() for x in qkv())
    op = Op(small(), total=4)
    op(q, k, v, 1).sum().backward()
    assert q.grad is not None
    assert "gradients" in next(iter(op.ledger().dense))


def test_key_value_heads_are_shared():
    op, reference = Op(small(density=0.3), total=4), Op(small(density=0.3), total=4)
    op.site.terminal = lambda call: F.scaled_dot_product_attention(call.q, call.k, call.v, enable_gqa=True)
    for step in range(3):
        q, k, v = qkv(seed=step)
        k, v = k[:, :2], v[:, :2]
        assert close(op(q, k, v, step), reference(q, *(x.repeat_interleave(2, 1) for x in (k, v)), step))


# --- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"density": 0},
        {"density": 1.1},
        {"warmup_steps": -1},
        {"warmup_steps": 1.5},
        {"warmup_steps": True},
        {"search_steps": [1.2]},
        {"search_steps": [-1]},
        {"warmup_steps": 10, "search_steps": [8, 30]},
        {"warmup_steps": 0.2, "search_steps": [0.1]},
        {"block_size": 0},
        {"block_size": (64, 64, 64)},
        {"recall_threshold": 2.0},
        {"selection": "columns"},
        {"min_tokens": -1},
    ],
)
def test_impossible_options(options):
    with pytest.raises(InvalidOption, match="adaspa"):
        AdaSpa(**options)


def test_options_survive_a_round_trip():
    recipe = AdaSpa(density=0.25, warmup_steps=5, search_steps=[4, 0.5], block_size=(128, 64), heads="0-3")
    assert AdaSpa.build(recipe.options()) == recipe
    assert AdaSpa.schema()["properties"]["density"]["default"] == 0.2


def test_predicted_cost():
    assert AdaSpa().attention_cost(100_000, 50) == pytest.approx((10 + 0.5 + 0.5 + 40 * 0.2) / 50)
    assert AdaSpa(search_steps=[]).attention_cost(100_000, 50) == pytest.approx((10 + 0.5 + 40 * 0.2) / 50)
    assert AdaSpa(steps=(0.0, 0.5)).attention_cost(100_000, 50) == pytest.approx((10 + 0.5 + 15 * 0.2 + 25) / 50)
    assert AdaSpa(warmup_steps=1.0).attention_cost(100_000, 50) == 1.0
    assert AdaSpa(steps=(0.0, 0.2)).attention_cost(100_000, 50) == 1.0
    assert AdaSpa().attention_cost(1000, 50) == 1.0


def test_where_the_kernel_would_lose_to_dense_it_runs_dense_and_says_so():
    q, k, v = qkv(tokens=4096, heads=1)
    op = Op(small(density=0.9, block_size=64))
    op(q, k, v, 0)
    out = op(q, k, v, 1)
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v))
    (reason,) = (r for r in op.ledger().dense if r.startswith("dense is faster"))
    assert "too dense to gain" in reason
    assert op.ledger().counts["sparse"] == 0
    assert not op.ledger().cautions

    short = Op(small(density=0.9))  # asked for by a lowered min_tokens
    q, k, v = qkv(tokens=160)
    short(q, k, v, 0)
    assert not torch.equal(short(q, k, v, 1), F.scaled_dot_product_attention(q, k, v))
    assert short.ledger().counts["sparse"] == 1
    (caution,) = short.ledger().cautions.items()
    assert caution[0] == "slower than dense expected"
    assert "too short to gain" in caution[1]
