"""Dead band, runs and packed attention against their definitions (DeltaLLM, arXiv 2507.19608)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from patchkit.kernels import (
    GradientError,
    KernelTypeError,
    KernelValueError,
    dead_band,
    find_runs,
    pack_runs,
    packed_attention,
)
from patchkit.kernels.deadband.reference import dead_band_reference
from patchkit.kernels.packed.reference import packed_attention_reference
from patchkit.kernels.runs.reference import find_runs_reference, pack_runs_reference

METRICS = pytest.mark.parametrize(("metric", "theta"), [("max", 1.2), ("euclidean", 2.5), ("cosine", 0.75)])


def walk(*shape: int, step: float = 0.5, seed: int = 0) -> Tensor:
    """Keys (B, Hkv, N, D) that move a little from token to token."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g).mul_(step).cumsum_(2).remainder_(4.0) - 2.0


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- the dead band ------------------------------------------------------------------------------------------------


def test_the_error_stays_within_theta_over_ten_thousand_tokens() -> None:
    k = torch.randn(1, 1, 10_000, 4, generator=torch.Generator().manual_seed(0)).mul(0.1).cumsum(2)
    khat, kept = dead_band(k, 0.3)
    assert float((khat - k).abs().max()) <= 0.3
    # thresholding the differences of neighbours, as a naive port does, drifts away
    steps = k.diff(dim=2, prepend=torch.zeros(1, 1, 1, 4))
    drifting = torch.where(steps.abs() > 0.3, steps, 0.0).cumsum(2)
    assert float((drifting - k).abs().max()) > 0.6
    assert 0 < float(kept.float().mean()) < 4


def test_scores_telescope_and_stay_within_their_bound() -> None:
    k, q, theta = walk(2, 2, 90, 16), noise(2, 2, 30, 16), 0.4
    dk, _ = dead_band_reference(k, theta)
    khat, _ = dead_band(k, theta)
    increments = (q @ dk.transpose(-1, -2)).cumsum(-1)
    torch.testing.assert_close(increments, q @ khat.transpose(-1, -2), atol=2e-5, rtol=1e-5)
    error = (increments - q @ k.transpose(-1, -2)).abs()
    assert (error <= theta * q.abs().sum(-1, keepdim=True) + 1e-4).all()


def test_an_example_by_hand() -> None:
    """Four tokens, two elements: the first row counts as kept, a change of exactly theta does not."""
    k = torch.tensor([[[[1.0, 0.0], [1.5, 0.2], [1.6, 1.0], [1.1, 1.0]]]])
    khat, kept = dead_band(k, 0.5)
    assert torch.equal(khat, torch.tensor([[[[1.0, 0.0], [1.0, 0.0], [1.6, 1.0], [1.6, 1.0]]]]))
    assert kept.tolist() == [[[2, 0, 2, 0]]]


@pytest.mark.parametrize("theta", [0.0, 0.3, float("inf")])
def test_dead_band_against_its_definition(theta: float) -> None:
    k, start = walk(3, 2, 41, 7), torch.tensor([0, 5, 40])
    dk, kept = dead_band_reference(k, theta, start=start)
    khat, counted = dead_band(k, theta, start=start)
    assert torch.equal(counted, kept)
    for b, at in enumerate(start.tolist()):
        torch.testing.assert_close(khat[b, :, at:], dk[b, :, at:].cumsum(1), atol=1e-5, rtol=1e-5)
        assert torch.equal(khat[b, :, : at + 1], k[b, :, : at + 1])
    if theta == 0:
        assert torch.equal(khat, k)
    alone, _ = dead_band(k[1:2, :, 5:], theta)
    assert torch.equal(khat[1:2, :, 5:], alone), "what stands before the first real token does not matter"


def test_dead_band_goes_on_where_it_ended() -> None:
    k = walk(2, 3, 50, 8)
    whole, kept = dead_band(k, 0.5)
    a, kept_a = dead_band(k[:, :, :17], 0.5)
    b, kept_b = dead_band(k[:, :, 17:], 0.5, reference=a[:, :, -1])
    assert torch.equal(torch.cat([a, b], 2), whole)
    assert torch.equal(torch.cat([kept_a, kept_b], 2), kept)


def test_dead_band_takes_a_threshold_a_head() -> None:
    k = walk(2, 3, 30, 8)
    theta = torch.tensor([0.1, 0.5, 2.0])
    khat, _ = dead_band(k, theta)
    for h in range(3):
        assert torch.equal(khat[:, h], dead_band(k[:, h : h + 1], float(theta[h]))[0][:, 0])


def test_sparsity_grows_with_theta() -> None:
    k = walk(1, 2, 300, 16)
    kept = [int(dead_band(k, theta)[1].sum()) for theta in (0.0, 0.2, 0.5, 1.0, 2.0, 9.0)]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > kept[-1] == 2 * 16  # the first row only


# --- runs ---------------------------------------------------------------------------------------------------------


@METRICS
@pytest.mark.parametrize(("n", "chunk"), [(1, 8), (7, 8), (8, 8), (9, 8), (37, 8), (61, 64)])
def test_runs_against_their_definition(metric: str, theta: float, n: int, chunk: int) -> None:
    k = walk(2, 2, n, 8, step=0.4)
    for single, first in ((0, 0), (3, 0), (11, 0), (chunk + 2, chunk)):
        wanted = find_runs_reference(k, theta, metric, chunk, single, first)
        got = find_runs(k, theta, metric=metric, chunk=chunk, single=single, first=first)
        assert torch.equal(got, wanted)
    assert metric != "max" or n < 30 or int(wanted.sum()) < wanted.numel(), "some run has several tokens"


@METRICS
def test_runs_are_the_same_for_strided_views_and_in_bf16(metric: str, theta: float) -> None:
    k = walk(2, 4, 70, 24).bfloat16()
    strided = k.transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    a, b = (find_runs(x, theta, metric=metric, chunk=32) for x in (k, strided))
    assert torch.equal(a, b)


def test_every_key_is_within_theta_of_its_run() -> None:
    k, v = walk(1, 2, 200, 8), noise(1, 2, 200, 8)
    begins = find_runs(k, 0.8, chunk=64)
    packed = pack_runs(k, v, begins)
    expanded = packed.keys.gather(2, (begins.cumsum(-1) - 1).unsqueeze(-1).expand(k.shape))
    assert float((expanded - k).abs().max()) <= 0.8
    assert packed.counts.sum(-1).tolist() == [[200, 200]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_against_its_definition(dtype: torch.dtype) -> None:
    k, v = walk(2, 3, 45, 8).to(dtype), noise(2, 3, 45, 8).to(dtype)
    begins = find_runs(k, torch.tensor([0.5, 1.5, 9.0]), chunk=16, single=2)
    packed = pack_runs(k, v, begins)
    keys, values, counts = pack_runs_reference(k, v, begins)
    for b in range(2):
        for h in range(3):
            m = len(counts[b][h])
            assert packed.counts[b, h].tolist() == counts[b][h].tolist() + [0] * (packed.counts.shape[2] - m)
            assert torch.equal(packed.keys[b, h, :m].float(), keys[b][h])
            torch.testing.assert_close(packed.values[b, h, :m], values[b][h].to(dtype))
            assert packed.keys[b, h, m:].abs().sum() == packed.values[b, h, m:].abs().sum() == 0


def test_mean_keys_are_nearer_than_first_keys() -> None:
    k, v = walk(1, 1, 128, 8), noise(1, 1, 128, 8)
    begins = find_runs(k, 1.0, chunk=64)
    run = (begins.cumsum(-1) - 1).unsqueeze(-1).expand(k.shape)
    errors = [(pack_runs(k, v, begins, mean_keys=m).keys.gather(2, run) - k).norm() for m in (False, True)]
    assert errors[1] < 0.9 * errors[0]


# --- packed attention ---------------------------------------------------------------------------------------------


def problem(
    H: int, Hkv: int, tokens: int, queries: int, chunk: int, back: int, D: int = 16, B: int = 1, single: int = 0
):
    """Everything that ``packed_attention`` takes, packed as the recipe does: exact from ``back`` chunks before."""
    k, v, q = walk(B, Hkv, tokens, D), noise(B, Hkv, tokens, D), noise(B, H, queries, D, seed=2)
    first = tokens - queries
    blocks = range(first // chunk, (tokens - 1) // chunk + 1)
    exact = [max(0, b - back) * chunk for b in blocks]
    packable = exact[-1]
    begins = find_runs(k[:, :, :packable], 1.4, chunk=chunk, single=single)
    packed = pack_runs(k[:, :, :packable], v[:, :, :packable], begins)
    upto = F.pad(begins.cumsum(-1).int(), (1, 0))
    used = torch.stack([upto[:, :, e] for e in exact])
    keep = slice(exact[0], None)
    args = (q, packed, used, k[:, :, keep], v[:, :, keep], exact)
    return args, {"chunk": chunk, "first": first}, (q, k, v, begins, exact)


def expanded(q: Tensor, k: Tensor, v: Tensor, begins: Tensor, exact: list[int], chunk: int, first: int) -> Tensor:
    """Dense attention over N keys: in each query's past the key of the run, from its exact region on the key itself."""
    group, N = q.shape[1] // k.shape[1], k.shape[2]
    at = torch.arange(begins.shape[2]).where(begins, torch.tensor(0)).cummax(-1).values
    khat = k.clone()
    khat[:, :, : begins.shape[2]] = k.gather(2, at.unsqueeze(-1).expand(*at.shape, k.shape[-1]))
    position = torch.arange(first, first + q.shape[2])
    start = torch.tensor(exact)[position // chunk - first // chunk].unsqueeze(-1)
    scores, approximate = (q @ x.repeat_interleave(group, 1).transpose(-1, -2) * q.shape[-1] ** -0.5 for x in (k, khat))
    scores = torch.where(torch.arange(N) >= start, scores, approximate)
    scores = scores.masked_fill(torch.arange(N) > position.unsqueeze(-1), float("-inf"))
    return scores.softmax(-1) @ v.repeat_interleave(group, 1)


SHAPES = pytest.mark.parametrize(
    ("H", "Hkv", "tokens", "queries", "chunk", "back"),
    [(4, 1, 67, 67, 16, 1), (5, 1, 64, 64, 16, 0), (4, 4, 97, 20, 16, 2), (8, 2, 50, 1, 8, 1), (2, 1, 7, 7, 16, 1)],
)


@SHAPES
def test_packed_attention_is_dense_attention_over_the_expanded_keys(H, Hkv, tokens, queries, chunk, back) -> None:
    args, more, dense = problem(H, Hkv, tokens, queries, chunk, back, B=2)
    wanted = expanded(*dense, **more)
    torch.testing.assert_close(packed_attention_reference(*args, **more), wanted, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(packed_attention(*args, **more), wanted, atol=2e-6, rtol=1e-5)


def test_the_first_tokens_value_instead_of_the_mean_is_another_result() -> None:
    args, more, dense = problem(4, 1, 128, 64, 16, 1)
    q, packed, used, *rest = args
    _, _, v, begins, _ = dense
    firsts = torch.stack([v[0, 0, : begins.shape[2]][begins[0, 0]]]).unsqueeze(0)
    wrong = packed_attention(q, packed._replace(values=firsts), used, *rest, **more)
    wanted = expanded(*dense, **more)
    assert float((wrong - wanted).norm() / wanted.norm()) > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_count_zero_weigh_nothing(dtype: torch.dtype) -> None:
    """Rows past the end of a head's list, and heads with one run or none in sight: no NaN, exactly nothing."""
    k = torch.cat([walk(1, 1, 64, 16), torch.ones(1, 1, 64, 16)], 1).to(dtype)
    v, q = noise(1, 2, 64, 16).to(dtype), noise(1, 4, 20, 16, seed=2).to(dtype)
    packed = pack_runs(k[:, :, :48], v[:, :, :48], find_runs(k[:, :, :48], 0.5, chunk=64))
    assert packed.counts[0, 1].tolist() == [48] + [0] * (packed.counts.shape[2] - 1)
    used = torch.tensor([[[1, 0]], [[40, 1]]], dtype=torch.int32).clamp(max=packed.counts.shape[2])
    args = (used, k[:, :, 32:], v[:, :, 32:], [32, 40])
    out = packed_attention(q, packed, *args, chunk=16, first=44)
    assert out.isfinite().all()
    spoilt = packed.keys.clone(), packed.values.clone()
    for x in spoilt:
        x[0, 1, 1:] = 7.0
    again = packed_attention(q, packed._replace(keys=spoilt[0], values=spoilt[1]), *args, chunk=16, first=44)
    assert torch.equal(out, again)
    exact = packed_attention_reference(q, packed, *args, chunk=16, first=44)
    relative = float((out.float() - exact).norm() / exact.norm())
    assert relative < {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]


def test_first_blocks_without_runs_are_attended_at_once() -> None:
    """As under a recipe that leaves the first tokens dense; the next block sees runs."""
    args, more, (q, k, v, begins, _) = problem(4, 2, 90, 90, 16, 1)
    _, packed, used, *_ = args
    late = [0, 0, 0, 0, 48, 64]
    used = used.clone()
    used[:4] = 0
    used[4] = begins[:, :, :48].sum(-1)
    out = packed_attention(q, packed, used, k, v, late, **more)
    torch.testing.assert_close(out, expanded(q, k, v, begins, late, **more), atol=2e-6, rtol=1e-5)
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out[:, :, :64], dense[:, :, :64], atol=2e-6, rtol=1e-5)
    assert not torch.allclose(out[:, :, 64:], dense[:, :, 64:], atol=1e-3)


def test_strided_inputs() -> None:
    args, more, dense = problem(4, 2, 80, 80, 16, 1)
    q, packed, used, k, v, exact = args
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    torch.testing.assert_close(
        packed_attention(q, packed, used, k, v, exact, **more), expanded(*dense, **more), atol=2e-6, rtol=1e-5
    )


def test_refusals() -> None:
    k = walk(1, 2, 32, 8)
    with pytest.raises(KernelValueError, match=r"theta is -1"):
        dead_band(k, -1.0)
    with pytest.raises(KernelValueError, match="leave start out"):
        dead_band(k, 1.0, reference=k[:, :, 0], start=torch.tensor([0]))
    with pytest.raises(KernelValueError, match="theta"):
        dead_band(k, torch.ones(3))
    with pytest.raises(KernelTypeError):
        find_runs(k.long(), 1.0)
    with pytest.raises(KernelValueError, match="multiple of chunk"):
        find_runs(k, 1.0, chunk=16, first=8)
    with pytest.raises(KernelValueError, match="metric"):
        find_runs(k, 1.0, metric="l1")  # type: ignore[arg-type]
    with pytest.raises(GradientError):
        dead_band(k.clone().requires_grad_(), 1.0)
    args, more, _ = problem(4, 1, 64, 64, 16, 1)
    q, packed, used, k, v, exact = args
    with pytest.raises(KernelValueError, match="after its first query"):
        packed_attention(q, packed, used, k, v, [0, 0, 40, 32], **more)
    with pytest.raises(KernelValueError, match="blocks"):
        packed_attention(q, packed, used[1:], k, v, exact, **more)
    with pytest.raises(KernelTypeError, match="one dtype"):
        packed_attention(q.half(), packed, used, k, v, exact, **more)
