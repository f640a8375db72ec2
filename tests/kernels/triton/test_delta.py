"""The Triton kernels of dead band, runs and packed attention, interpreted, against their definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F


def walk(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g).mul_(0.5).cumsum_(2).remainder_(4.0) - 2.0


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def strided(x):
    """The same numbers as a (B, N, H, D) view, and NaN in what lies around them."""
    B, H, N, D = x.shape
    whole = torch.full((B, N + 3, H, D), float("nan"), dtype=x.dtype)
    whole[:, 1 : N + 1] = x.transpose(1, 2)
    return whole[:, 1 : N + 1].transpose(1, 2)


@pytest.fixture
def kernels(on_triton, nan_buffers, monkeypatch):
    """``patchkit.kernels`` on the Triton path; at the end, each kernel that was asked for has run."""
    from patchkit import kernels
    from patchkit.kernels.packed import blocked

    monkeypatch.setattr(blocked, "dense_with_lse", None)
    monkeypatch.setattr("patchkit.kernels.deadband.dead_band_blocked", None)
    monkeypatch.setattr("patchkit.kernels.runs.find_runs_blocked", None)
    monkeypatch.setattr("patchkit.kernels.runs.pack_runs_blocked", None)
    monkeypatch.setattr("patchkit.kernels.packed.packed_attention_blocked", None)
    return kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("way", ["start", "reference", "plain"])
def test_dead_band(kernels, dtype, way):
    from patchkit.kernels.deadband.reference import dead_band_reference

    k, theta = walk(2, 2, 21, 20).to(dtype), torch.tensor([0.3, 1.0])
    start = torch.tensor([0, 6]) if way == "start" else None
    reference = noise(2, 2, 20).to(dtype) if way == "reference" else None
    khat, kept = kernels.dead_band(strided(k), theta, start=start, reference=reference)
    dk, wanted = dead_band_reference(k, theta, reference, start)
    assert torch.equal(kept, wanted)
    assert khat.dtype == dtype
    base = reference.float().unsqueeze(2) if reference is not None else 0.0
    for b, at in enumerate(start.tolist() if start is not None else (0, 0)):
        summed = (base[b] if reference is not None else 0.0) + dk[b, :, at:].cumsum(1)
        torch.testing.assert_close(khat[b, :, at:].float(), summed, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(("metric", "theta"), [("max", 1.3), ("euclidean", 2.5), ("cosine", 0.75)])
@pytest.mark.parametrize(
    ("n", "chunk", "single", "first"), [(37, 16, 0, 0), (20, 16, 18, 0), (9, 16, 3, 16), (1, 8, 0, 0)]
)
def test_find_runs(kernels, metric, theta, n, chunk, single, first):
    from patchkit.kernels.runs.reference import find_runs_reference

    k = walk(1, 2, n, 20)
    found = kernels.find_runs(strided(k), theta, metric=metric, chunk=chunk, single=single, first=first)
    assert torch.equal(found, find_runs_reference(k, theta, metric, chunk, single, first))


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_pack_runs(kernels, monkeypatch, mean, dtype):
    """Programs that begin inside a run, runs that end behind their program, heads of different lengths."""
    from patchkit.kernels.runs import triton
    from patchkit.kernels.runs.blocked import pack_runs_blocked

    monkeypatch.setattr(triton, "PART", 8)
    k, v = walk(1, 3, 43, 20).to(dtype), noise(1, 3, 43, 12).to(dtype)
    begins = torch.zeros(1, 3, 43, dtype=torch.bool)
    begins[:, :, 0] = True
    begins[0, 0, [1, 7, 8, 9, 30]] = True
    begins[0, 1, ::3] = True
    packed = kernels.pack_runs(strided(k), strided(v), begins, mean_keys=mean)
    keys, values, counts = pack_runs_blocked(k, v, begins, mean)
    assert torch.equal(packed.counts, counts)
    torch.testing.assert_close(packed.keys, keys, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(packed.values, values, atol=2e-3, rtol=1e-3)


def problem(B, H, Hkv, tokens, queries, chunk, back, D, dtype):
    from patchkit.kernels import Packed
    from patchkit.kernels.runs.blocked import find_runs_blocked, pack_runs_blocked

    k, v = walk(B, Hkv, tokens, D), noise(B, Hkv, tokens, D)
    q = noise(B, H, queries, D, seed=2)
    first = tokens - queries
    exact = [max(0, b - back) * chunk for b in range(first // chunk, (tokens - 1) // chunk + 1)]
    used = torch.zeros(len(exact), B, Hkv, dtype=torch.int32)
    packed = Packed(k[:, :, :0], v[:, :, :0], torch.zeros(B, Hkv, 0, dtype=torch.int32))
    if exact[-1]:
        past = k[:, :, : exact[-1]], v[:, :, : exact[-1]]
        theta = torch.full((B, Hkv), 1.6)
        theta[0, 0] = 9.0
        begins = find_runs_blocked(past[0], theta, "max", chunk, 0, 0)
        packed = Packed(*pack_runs_blocked(*past, begins, False))
        used = torch.stack([F.pad(begins.cumsum(-1).int(), (1, 0))[:, :, e] for e in exact])
    packed = Packed(packed.keys.to(dtype), packed.values.to(dtype), packed.counts)
    spoilt = packed.counts == 0  # rows past the end of a list are not to be read
    packed.keys[spoilt], packed.values[spoilt] = float("nan"), float("nan")
    rest = (x[:, :, exact[0] :].to(dtype) for x in (k, v))
    return (q.to(dtype), packed, used, *rest, exact), {"chunk": chunk, "first": first}


@pytest.mark.parametrize(
    ("B", "H", "Hkv", "tokens", "queries", "chunk", "back", "D"),
    [
        (1, 4, 1, 63, 63, 32, 0, 64),
        (2, 2, 2, 100, 30, 32, 0, 20),
        (1, 1, 1, 32, 32, 32, 1, 64),
        (1, 1, 1, 90, 70, 64, 0, 80),
        (1, 2, 1, 150, 23, 32, 1, 128),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_prefill(kernels, close, monkeypatch, B, H, Hkv, tokens, queries, chunk, back, D, dtype):
    from patchkit.kernels.packed import triton
    from patchkit.kernels.packed.reference import packed_attention_reference

    monkeypatch.setattr(triton, "FEW", 0)
    monkeypatch.setitem(triton.LARGEST_HEAD, 4, 128)
    monkeypatch.setitem(triton.PREFILL, (128, 4), triton.Tile(32, 16, 4, 2))
    args, more = problem(B, H, Hkv, tokens, queries, chunk, back, D, dtype)
    q, packed, used, k, v, exact = args
    out = kernels.packed_attention(strided(q), packed, used, strided(k), strided(v), exact, **more)
    clean = packed._replace(keys=packed.keys.nan_to_num(), values=packed.values.nan_to_num())
    close(out, packed_attention_reference(q, clean, used, k, v, exact, **more))


@pytest.mark.parametrize(("queries", "splits"), [(1, 1), (1, 3), (3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_decode(kernels, close, monkeypatch, queries, splits, dtype):
    """All heads of a group in one tile; splits that have no packed rows, and a sample with one run."""
    from patchkit.kernels.packed import triton
    from patchkit.kernels.packed.reference import packed_attention_reference

    monkeypatch.setattr(triton, "_splits", lambda *a: splits)
    args, more = problem(2, 10, 2, 77, queries, 16, 1, 40, dtype)
    q, packed, used, k, v, exact = args
    assert len(exact) == 1
    out = kernels.packed_attention(strided(q), packed, used, strided(k), strided(v), exact, **more)
    clean = packed._replace(keys=packed.keys.nan_to_num(), values=packed.values.nan_to_num())
    close(out, packed_attention_reference(q, clean, used, k, v, exact, **more))


def test_what_the_packed_kernels_do_not_take(kernels):
    """Short or odd chunks only where the queries do not fit one tile; fp32 only as far as the registers go."""
    from patchkit.kernels.packed import triton_obstacle

    q, k = torch.zeros(1, 8, 40, 64), torch.zeros(1, 2, 40, 64)
    assert triton_obstacle(q, k, 64, 1) is None
    assert "chunks of 16" in triton_obstacle(q, k, 16, 3)
    assert "chunks of 48" in triton_obstacle(q, k, 48, 1)
    assert triton_obstacle(q[:, :, :1], k, 16, 1) is None
    assert "head size 80" in triton_obstacle(torch.zeros(1, 1, 1, 80), torch.zeros(1, 1, 1, 80), 64, 1)
    assert "float64" in triton_obstacle(q.double(), k.double(), 64, 1)


def test_splits_fill_the_card_and_none_is_tiny(kernels):
    from patchkit.kernels.packed import triton

    assert triton._splits(100, 1, torch.device("cpu")) == 1
    assert triton._splits(256 * 9, 1, torch.device("cpu")) == 4
    assert triton._splits(256 * 9, 100, torch.device("cpu")) == 1
