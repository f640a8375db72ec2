"""Gradients of block-sparse attention against autograd through the masked dense softmax."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from patchkit.kernels import BlockLayout, ElementRule, GradientError, block_sparse_attention, merge_states
from patchkit.kernels.sparse.backward_reference import block_sparse_backward_reference
from patchkit.kernels.sparse.blocked.backward import block_sparse_backward_blocked

# Gradients round once more than outputs: P and dS from an fp32 LSE.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def random_layout(shape, N, M, bq, bk, share=0.5, seed=1, **kw):
    g = torch.Generator().manual_seed(seed)
    keep = torch.rand(*shape, -(-N // bq), -(-M // bk), generator=g) < share
    return BlockLayout.from_bool(keep, block_q=bq, block_k=bk, q_len=N, kv_len=M, **kw)


def masked_softmax(q, k, v, layout, scale=None):
    """Output and LSE by plain torch, differentiable; in fp64 when the inputs are."""
    group = q.shape[1] // k.shape[1]
    mask = layout.element_mask().expand(q.shape[0], q.shape[1], -1, -1)
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    live = mask.any(-1)
    logits = (q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)).masked_fill(~mask, float("-inf"))
    logits = logits.masked_fill(~live.unsqueeze(-1), 0)
    lse = torch.logsumexp(logits, -1).masked_fill(~live, float("-inf"))
    return torch.softmax(logits, -1).masked_fill(~live.unsqueeze(-1), 0) @ v, lse


def seeds_of(out, lse, seed=7):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(out.shape, generator=g), torch.randn(lse.shape, generator=g)


def exact(q, k, v, layout, dout, dlse=None, scale=None):
    """Gradients by autograd, fp64; also the output and LSE."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    out, lse = masked_softmax(q, k, v, layout, scale)
    live = ~lse.isneginf()
    total = (out * dout.double()).sum()
    if dlse is not None:
        total = total + (lse[live] * dlse.double()[live]).sum()
    return torch.autograd.grad(total, (q, k, v)), out.detach(), lse.detach()


def gradients(q, k, v, layout, dout, dlse=None, **kw):
    """Gradients through the operator."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, lse = block_sparse_attention(q, k, v, layout, return_lse=True, **kw)
    if dlse is None:
        return torch.autograd.grad(out, (q, k, v), dout.to(out.dtype))
    return torch.autograd.grad((out, lse), (q, k, v), (dout.to(out.dtype), dlse))


GRID = [
    # B, H, Hkv, N, M, D, block_q, block_k, B', H'
    pytest.param(1, 2, 2, 63, 63, 60, 64, 64, 1, 2, id="shorter-than-a-block"),
    pytest.param(2, 4, 1, 200, 333, 64, 64, 64, 2, 4, id="gqa4-ragged-both-batch-masks"),
    pytest.param(2, 2, 2, 600, 600, 80, 64, 64, 1, 1, id="d80-shared-layout"),
    pytest.param(1, 4, 2, 128, 700, 128, 128, 64, 1, 4, id="cross-lengths-q128"),
    pytest.param(2, 3, 3, 200, 130, 64, 32, 16, 2, 1, id="small-blocks-head-broadcast"),
    pytest.param(1, 1, 1, 300, 300, 64, 64, 128, 1, 1, id="wide-key-blocks"),
]


@pytest.mark.parametrize(("B", "H", "Hkv", "N", "M", "D", "bq", "bk", "Bl", "Hl"), GRID)
@pytest.mark.parametrize("with_lse", [False, True], ids=["out", "out+lse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_equals_autograd(qkv, close, B, H, Hkv, N, M, D, bq, bk, Bl, Hl, with_lse, dtype):
    q, k, v = qkv(B, H, Hkv, N, M, D, dtype)
    layout = random_layout((Bl, Hl), N, M, bq, bk)
    dout, dlse = seeds_of(q, q[..., 0])
    dlse = dlse if with_lse else None
    expected, out, lse = exact(q, k, v, layout, dout, dlse)
    for got, want in zip(gradients(q, k, v, layout, dout, dlse), expected, strict=True):
        assert got.dtype == dtype
        close(got, want, TOLERANCE[dtype])
    if dtype == torch.float32:
        found = block_sparse_backward_reference(q, k, v, out.float(), lse.float(), dout, dlse, layout)
        for got, want in zip(found, expected, strict=True):
            close(got, want, TOLERANCE[dtype])


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
def test_partial_blocks(qkv, close, rule, lens, N, M):
    q, k, v = qkv(2, 4, 2, N, M, 64)
    kv_lens = torch.tensor([M - 70, M]) if lens else None
    layout = random_layout((1, 4), N, M, 64, 64, 0.8, rule=RULES[rule](N, M, 2), kv_lens=kv_lens)
    assert layout.part_mask != "none"
    dout, dlse = seeds_of(q, q[..., 0])
    expected, _, _ = exact(q, k, v, layout, dout, dlse)
    for got, want in zip(gradients(q, k, v, layout, dout, dlse), expected, strict=True):
        close(got, want, TOLERANCE[torch.float32])


@pytest.mark.parametrize("bk", [32, 64, 100])
def test_row_bits(qkv, close, bk):
    N, M = 130, 210
    table = torch.rand(2, 3, N, M, generator=torch.Generator().manual_seed(3)) < 0.3
    table[..., :bk] = True
    layout = BlockLayout.from_mask_mod(
        lambda b, h, i, n: table[b, h, i, n], block_q=64, block_k=bk, q_len=N, kv_len=M, batch=2, heads=3
    )
    assert layout.part_mask == "bits"
    q, k, v = qkv(2, 3, 1, N, M, 64)
    dout, dlse = seeds_of(q, q[..., 0])
    expected, _, _ = exact(q, k, v, layout, dout, dlse)
    for got, want in zip(gradients(q, k, v, layout, dout, dlse), expected, strict=True):
        close(got, want, TOLERANCE[torch.float32])


@pytest.mark.parametrize("with_lse", [False, True], ids=["out", "out+lse"])
@pytest.mark.parametrize("lens", [None, [170, 170], [200, 65], [129, 0]], ids=["whole", "equal", "ragged", "empty"])
def test_complete_layouts(qkv, close, with_lse, lens):
    """Dense by another name, also for samples of different length, GQA and a query that is not contiguous."""
    q, k, v = qkv(2, 4, 2, 150, 200, 64)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    kv_lens = None if lens is None else torch.tensor(lens)
    layout = random_layout((2, 1), 150, 200, 64, 64, 1.1, kv_lens=kv_lens)
    dout, dlse = seeds_of(q, q[..., 0])
    dlse = dlse if with_lse else None
    expected, _, _ = exact(q, k, v, layout, dout, dlse)
    for got, want in zip(gradients(q, k, v, layout, dout, dlse), expected, strict=True):
        close(got, want, TOLERANCE[torch.float32])


def test_gradcheck_of_the_formula(qkv):
    q, k, v = (x.double().requires_grad_() for x in qkv(1, 2, 1, 11, 13, 4))
    layout = random_layout((1, 2), 11, 13, 4, 4, 0.6, rule=ElementRule(causal_offset=5))

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            out, lse = masked_softmax(q, k, v, layout)
            ctx.save_for_backward(q, k, v, out, lse)
            return out, lse.nan_to_num(neginf=0.0)

        @staticmethod
        def backward(ctx, dout, dlse):
            return block_sparse_backward_reference(*ctx.saved_tensors, dout, dlse, layout)

    assert torch.autograd.gradcheck(Attention.apply, (q, k, v))


def test_empty_rows_and_unused_keys_have_gradient_zero(qkv, close):
    q, k, v = qkv(1, 2, 1, 200, 200, 64)
    keep = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    keep[0, 1, 2, 1] = True
    layout = BlockLayout.from_bool(keep, block_q=64, block_k=64, q_len=200, kv_len=200)
    dout, dlse = seeds_of(q, q[..., 0])
    expected, _, _ = exact(q, k, v, layout, dout, dlse)
    # Whatever comes back through the LSE of a row without keys is not a gradient of anything.
    dlse[0, 0] = float("nan")
    dlse[0, 1, :128] = float("inf")
    dq, dk, dv = gradients(q, k, v, layout, dout, dlse)
    for got, want in zip((dq, dk, dv), expected, strict=True):
        close(got, want, TOLERANCE[torch.float32])
    assert not dq[0, 0].any()
    for x in (dk, dv):
        assert torch.equal(x.abs().sum(-1)[0, 0] > 0, (torch.arange(200) >= 64) & (torch.arange(200) < 128))


def test_rows_without_keys_inside_partial_blocks(qkv, close):
    q, k, v = qkv(1, 1, 1, 128, 128, 64)
    layout = random_layout((1, 1), 128, 128, 64, 64, 1.1, rule=ElementRule(causal_offset=-10))
    dout, dlse = seeds_of(q, q[..., 0])
    expected, _, _ = exact(q, k, v, layout, dout, dlse)
    dlse[..., :10] = float("nan")
    for got, want in zip(gradients(q, k, v, layout, dout, dlse), expected, strict=True):
        close(got, want, TOLERANCE[torch.float32])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("rule", [None, ElementRule(causal_offset=60)], ids=["full", "causal"])
def test_dropped_values_never_leak(qkv, poison, rule):
    N, M = 200, 300
    q, k, v = qkv(2, 2, 2, N, M, 64)
    keep = torch.rand(2, 2, 4, 5, generator=torch.Generator().manual_seed(0)) < 0.7
    keep[..., 1] = False
    layout = BlockLayout.from_bool(
        keep, block_q=64, block_k=64, q_len=N, kv_len=M, kv_lens=torch.tensor([230, 0]), rule=rule
    )
    dout, dlse = seeds_of(q, q[..., 0])
    clean = gradients(q, k, v, layout, dout, dlse)
    for x in (k, v):
        x[:, :, 64:128] = poison
        x[0, :, 230:] = poison
        x[1] = poison
    found = gradients(q, k, v, layout, dout, dlse)
    for a, b in zip(found, clean, strict=True):
        assert torch.equal(a, b)
        assert not a[1].any()


def test_strided_inputs_and_formats(close):
    x = torch.randn(2, 300, 3, 4, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    layout = random_layout((2, 4), 300, 300, 64, 64)
    out = block_sparse_attention(*x.unbind(2), layout, layout_fmt="BNHD")
    out.sum().backward()  # an expanded gradient: stride 0
    q, k, v = (y.detach().transpose(1, 2) for y in x.unbind(2))
    expected, _, _ = exact(q, k, v, layout, torch.ones(q.shape))
    close(x.grad, torch.stack([g.transpose(1, 2) for g in expected], 2), TOLERANCE[torch.float32])


def test_a_chosen_scale_and_splits(qkv, close):
    q, k, v = qkv(1, 2, 1, 200, 300, 64)
    layout = random_layout((1, 2), 200, 300, 64, 64)
    dout, dlse = seeds_of(q, q[..., 0])
    expected, _, _ = exact(q, k, v, layout, dout, dlse, scale=0.3)
    for got, want in zip(gradients(q, k, v, layout, dout, dlse, scale=0.3, num_splits=3), expected, strict=True):
        close(got, want, TOLERANCE[torch.float32])


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)], ids=str)
@pytest.mark.parametrize("share", [0.5, 1.1], ids=["sparse", "complete"])
def test_only_what_is_needed(qkv, needs, share):
    tensors = qkv(1, 2, 1, 200, 200, 64)
    layout = random_layout((1, 2), 200, 200, 64, 64, share)
    dout, _ = seeds_of(tensors[0], tensors[0][..., 0])
    every = gradients(*tensors, layout, dout)
    inputs = [x.detach().requires_grad_(bool(n)) for x, n in zip(tensors, needs, strict=True)]
    block_sparse_attention(*inputs, layout).backward(dout)
    for x, full, n in zip(inputs, every, needs, strict=True):
        assert torch.equal(x.grad, full) if n else x.grad is None
    skipped = block_sparse_backward_blocked(
        *tensors, *block_sparse_attention(*tensors, layout, return_lse=True), dout, None, layout, 0.125, needs
    )
    assert [x is not None for x in skipped] == [bool(n) for n in needs]


def test_gradient_of_the_lse_alone(qkv, close):
    tensors = qkv(1, 2, 2, 200, 300, 64)
    layout = random_layout((1, 2), 200, 300, 64, 64)
    q, k, v = (x.detach().requires_grad_() for x in tensors)
    _, lse = block_sparse_attention(q, k, v, layout, return_lse=True)
    dlse = seeds_of(q, lse)[1]
    expected, _, _ = exact(*tensors, layout, torch.zeros(q.shape), dlse)
    found = torch.autograd.grad(lse, (q, k, v), dlse)
    for got, want in zip(found, expected, strict=True):
        close(got, want, TOLERANCE[torch.float32])
    assert not found[2].any()


def test_merging_two_results_is_differentiable(qkv, close):
    tensors = qkv(1, 2, 2, 333, 500, 64)
    both = torch.rand(1, 2, 6, 8, generator=torch.Generator().manual_seed(0)) < 0.7
    both[0, 0, 2] = False
    first = both & (torch.rand(both.shape, generator=torch.Generator().manual_seed(1)) < 0.5)
    make = partial(BlockLayout.from_bool, block_q=64, block_k=64, q_len=333, kv_len=500)
    q, k, v = (x.detach().requires_grad_() for x in tensors)
    parts = [block_sparse_attention(q, k, v, make(m), return_lse=True) for m in (first, both & ~first)]
    out, lse = merge_states(*parts[0], *parts[1])
    dout, dlse = seeds_of(out, lse)
    expected, _, _ = exact(*tensors, make(both), dout, dlse)
    for got, want in zip(torch.autograd.grad((out, lse), (q, k, v), (dout, dlse)), expected, strict=True):
        close(got, want, TOLERANCE[torch.float32])


@pytest.fixture
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("B", "Hkv"), [(1, 1), (2, 2)], ids=["one-kv-head", "four"])
def test_same_bits_for_every_run_and_thread_count(qkv, restored_threads, B, Hkv):
    q, k, v = qkv(B, 4, Hkv, 700, 900, 64)
    layout = random_layout((1, 4), 700, 900, 64, 64, rule=ElementRule(causal_offset=500))
    dout, dlse = seeds_of(q, q[..., 0])
    found = []
    for n in (2, 1, 3, 2):
        torch.set_num_threads(n)
        found.append(gradients(q, k, v, layout, dout, dlse))
    with ThreadPoolExecutor(3) as pool:
        found += pool.map(lambda _: gradients(q, k, v, layout, dout, dlse), range(3))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


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
def test_property_equals_autograd(qkv, close, N, M, D, group, bq, bk, share, offset, seed):
    q, k, v = qkv(2, 2, 2 // group, N, M, D, seed=seed)
    rule = None if offset is None else ElementRule(causal_offset=offset)
    layout = random_layout((2, 1), N, M, bq, bk, share, seed, rule=rule, kv_lens=torch.tensor([M, M // 2]))
    dout, dlse = seeds_of(q, q[..., 0], seed)
    expected, out, lse = exact(q, k, v, layout, dout, dlse)
    reference = block_sparse_backward_reference(q, k, v, out.float(), lse.float(), dout, dlse, layout)
    for found in (gradients(q, k, v, layout, dout, dlse), reference):
        for got, want in zip(found, expected, strict=True):
            # A row with one key has gradient 0 in q and k exactly, and rounding noise in fp32: an absolute floor.
            assert float((got - want).norm()) <= 1e-5 * float(want.norm()) + 1e-6 * dout.norm()


def test_one_graph_through_forward_and_backward(qkv):
    tensors = qkv(1, 2, 1, 200, 300, 64)
    layout = random_layout((1, 2), 200, 300, 64, 64, 0.6, rule=ElementRule(causal_offset=100))

    def step(q, k, v):
        out, lse = block_sparse_attention(q * 2, k, v, layout, return_lse=True)
        return (out.sin().sum() + lse.nan_to_num(neginf=0.0).sum()) / 100

    found = []
    for call in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        inputs = [x.detach().requires_grad_() for x in tensors]
        call(*inputs).backward()
        found.append([x.grad for x in inputs])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_operator_registration(qkv):
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 1, 100, 130, 64))
    layout = random_layout((1, 2), 100, 130, 64, 64)
    lists = (layout.kv_idx, layout.kv_num, None, None, None, None, None, None)
    op = torch.ops.patchkit.block_sparse_attention.default
    torch.library.opcheck(op, (q, k, v, *lists, 64, 64, None, 0.125, 1))
    out, lse = (x.detach() for x in block_sparse_attention(q, k, v, layout, return_lse=True))
    args = (q.detach(), k.detach(), v.detach(), out, lse, out, lse, *lists, 64, 64, None, 0.125, True, False, True)
    torch.library.opcheck(torch.ops.patchkit.block_sparse_attention_backward.default, args)


def test_layouts_are_found_again_in_the_backward(qkv, monkeypatch):
    """Also under activation checkpointing and for lists made in inference mode."""
    from patchkit.kernels.sparse import gradients as module

    seen = []
    real = module.block_sparse_backward
    monkeypatch.setattr(module, "block_sparse_backward", lambda *a: seen.append(a[7]) or real(*a))
    with torch.inference_mode():
        layout = random_layout((1, 2), 200, 200, 64, 64)
    inputs = [x.requires_grad_() for x in qkv(1, 2, 2, 200, 200, 64)]
    call = partial(block_sparse_attention, layout=layout)
    plain = torch.autograd.grad(call(*inputs).sum(), inputs)
    again = torch.autograd.grad(checkpoint(call, *inputs, use_reentrant=False).sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert [x is layout for x in seen] == [True, True]


def test_autocast_does_not_lower_the_precision(qkv):
    q, k, v = qkv(1, 2, 2, 200, 200, 64)
    layout = random_layout((1, 2), 200, 200, 64, 64)
    dout, dlse = seeds_of(q, q[..., 0])
    expected = gradients(q, k, v, layout, dout, dlse)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(q, k, v, layout, dout, dlse)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_second_derivatives_are_refused(qkv):
    q, k, v = (x.requires_grad_() for x in qkv(1, 1, 1, 64, 64, 64))
    layout = random_layout((1, 1), 64, 64, 16, 16)
    (dq,) = torch.autograd.grad(block_sparse_attention(q, k, v, layout).sin().sum(), q, create_graph=True)
    with pytest.raises(GradientError, match=r"block_sparse_attention: .* Second derivatives"):
        dq.sum().backward()


def test_training_follows_the_masked_softmax(qkv):
    """A small attention layer, 20 steps of Adam, once with each implementation: one loss curve."""
    N, width, heads = 160, 32, 2
    layout = random_layout((1, heads), N, N, 32, 32, 0.4, rule=ElementRule(causal_offset=0))
    x = torch.randn(2, N, width, generator=torch.Generator().manual_seed(1))

    def layer(weights, attention):
        q, k, v = (x @ weights[0]).view(2, N, 3, heads, -1).permute(2, 0, 3, 1, 4)
        return attention(q, k, v).transpose(1, 2).flatten(2) @ weights[1]

    def initial(seed):
        g = torch.Generator().manual_seed(seed)
        return [torch.randn(width, n, generator=g) / width**0.5 for n in (3 * width, width)]

    def dense(q, k, v):
        return masked_softmax(q, k, v, layout)[0]

    target = layer(initial(2), dense)

    def train(attention):
        weights = [w.requires_grad_() for w in initial(3)]
        optimiser, losses = torch.optim.Adam(weights, 1e-2), []
        for _ in range(20):
            loss = F.mse_loss(layer(weights, attention), target)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
        return torch.tensor(losses)

    sparse, expected = train(lambda q, k, v: block_sparse_attention(q, k, v, layout)), train(dense)
    assert expected[-1] < 0.7 * expected[0]
    assert torch.allclose(sparse, expected, rtol=1e-4)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak memory counter")
def test_no_quadratic_memory():
    """At 16,384 tokens one L x L fp32 tensor is 1 GiB; a quarter of it would already show."""
    n, d = 16384, 16

    def train(n: int) -> None:
        g = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, 1, n, d, generator=g).requires_grad_() for _ in range(3))
        W = torch.rand(n // 64, n // 64, generator=g)
        layout = BlockLayout.from_topk(W, n // 64 // 20, block_q=64, block_k=64, q_len=n, kv_len=n)
        block_sparse_attention(q, k, v, layout).sum().backward()
        assert q.grad is not None

    def field(name: str) -> int:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
        return int(line.split()[1]) * 1024

    train(2048)  # torch imports more of itself at the first backward
    Path("/proc/self/clear_refs").write_text("5")
    start = field("VmRSS")
    train(n)
    assert field("VmHWM") - start < 64 * 2**20
