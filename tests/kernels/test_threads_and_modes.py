"""The CPU paths under torch's modes: several threads, inference mode, autocast."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from patchkit.kernels import BlockLayout, block_mass, block_sparse_attention, dense_attention
from patchkit.kernels.threads import for_each


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def case(qkv, dtype=torch.float32):
    q, k, v = qkv(2, 4, 2, 700, 900, 64, dtype)
    keep = torch.rand(2, 4, 11, 15, generator=torch.Generator().manual_seed(0)) < 0.5
    layout = BlockLayout.from_bool(keep, block_q=64, block_k=64, q_len=700, kv_len=900)
    return q, k, v, layout


def run(q, k, v, layout):
    out, lse = block_sparse_attention(q, k, v, layout, return_lse=True)
    return out, lse, block_mass(q, k, lse, 64, 64)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_threads_change_nothing_but_time(qkv, two_threads):
    args = case(qkv)
    two = run(*args)
    assert torch.get_num_threads() == 2
    with ThreadPoolExecutor(1) as fresh:
        assert fresh.submit(torch.get_num_threads).result() == 2  # nor for threads started later
    torch.set_num_threads(1)
    assert same(two, run(*args))


def test_calls_from_several_threads(qkv, two_threads):
    args = case(qkv)
    expected = run(*args)
    with ThreadPoolExecutor(4) as pool:
        assert all(same(expected, got) for got in pool.map(lambda _: run(*args), range(8)))


def test_inference_mode(qkv, two_threads):
    args = case(qkv)
    expected = run(*args)
    with torch.inference_mode():
        assert same(expected, run(*(x.clone() if isinstance(x, torch.Tensor) else x for x in args)))


def test_an_error_in_a_thread_reaches_the_caller(two_threads):
    def fail(item: int) -> None:
        raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item"):
        for_each([1, 2, 3], lambda: fail, torch.device("cpu"))


def test_autocast_does_not_lower_the_precision(qkv):
    q, k, v, layout = case(qkv)
    expected = run(q, k, v, layout)
    with torch.autocast("cpu", torch.bfloat16):
        assert same(expected, run(q, k, v, layout))
        out, _ = dense_attention(q, k, v, return_lse=True, enable_gqa=True)
        assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
