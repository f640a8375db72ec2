"""Ways to compute block-sparse attention in plain torch on a CPU, side by side: why the blocked path is what it is.

    python benchmarks/cpu_alternatives.py --threads 2 --out benchmarks/results/cpu_alternatives.jsonl

*ours* multiplies gathered tiles as batched products; *rows* gathers the keys of one query block and calls torch's
fused kernel, block after block; *batched* does so for as many query blocks at once as a chunk holds. The last two get
lists of equal length, which need no mask: their best case. Calls take turns; each figure is retention (density x time
of a dense call / time), and stands only where the result is right.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from block_sparse_cpu import DTYPES, TOLERANCE, interleaved
from rows import append, conditions
from torch import Tensor

from patchkit.kernels import BlockLayout, block_sparse_attention

BLOCK = 64
CHUNKS_MIB = (1, 4, 16)  # bytes of gathered keys and values of one call of *batched*


def rows(q: Tensor, k: Tensor, v: Tensor, idx: Tensor) -> Tensor:
    """One fused call per query block; idx (H, Nq, m) are its key blocks."""
    out = torch.empty_like(q)
    for h in range(q.shape[1]):
        keys, values = (x[0, h].view(-1, BLOCK, x.shape[-1]) for x in (k, v))
        for p in range(idx.shape[1]):
            part = [x.index_select(0, idx[h, p]).view(1, 1, -1, x.shape[-1]) for x in (keys, values)]
            at = slice(p * BLOCK, (p + 1) * BLOCK)
            out[:, h : h + 1, at] = F.scaled_dot_product_attention(q[:, h : h + 1, at], *part)
    return out


def batched(q: Tensor, k: Tensor, v: Tensor, idx: Tensor, chunk: int) -> Tensor:
    """One fused call for as many query blocks as fit ``chunk`` bytes of keys and values."""
    H, D, m = q.shape[1], q.shape[-1], idx.shape[-1]
    first = torch.arange(H).view(-1, 1, 1) * (k.shape[2] // BLOCK)
    lists = (idx + first).view(-1, m)
    keys, values, tiles = (x.reshape(-1, BLOCK, D) for x in (k, v, q))
    out = torch.empty_like(tiles)
    count = max(1, chunk // (2 * m * BLOCK * D * k.element_size()))
    for a in range(0, len(tiles), count):
        part = lists[a : a + count]
        each = [x.index_select(0, part.reshape(-1)).view(len(part), 1, m * BLOCK, D) for x in (keys, values)]
        out[a : a + count] = F.scaled_dot_product_attention(tiles[a : a + count, None], *each)[:, 0]
    return out.view(q.shape)


def measure(N: int, D: int, dtype: str, density: float, heads: int, seconds: float) -> dict[str, float]:
    """Retention of each way at one setting."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, N, D, generator=g).to(DTYPES[dtype]) for _ in range(3))
    n = N // BLOCK
    idx = torch.rand(heads, n, n, generator=g).topk(max(1, round(density * n)), -1).indices.sort(-1).values
    keep = torch.zeros(1, heads, n, n, dtype=torch.bool).scatter_(-1, idx[None], True)
    layout = BlockLayout.from_bool(keep, block_q=BLOCK, block_k=BLOCK, q_len=N, kv_len=N)
    work: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: block_sparse_attention(q, k, v, layout),
        "rows": lambda: rows(q, k, v, idx),
    }
    for mib in CHUNKS_MIB:
        work[f"batched {mib} MiB"] = lambda mib=mib: batched(q, k, v, idx, mib << 20)
    mask = keep.repeat_interleave(BLOCK, -1).repeat_interleave(BLOCK, -2)[:, :1]
    expected = F.scaled_dot_product_attention(q[:, :1].float(), k[:, :1].float(), v[:, :1].float(), attn_mask=mask)
    for name, call in work.items():
        error = float((call()[:, :1].float() - expected).norm() / expected.norm())
        if not error < TOLERANCE[dtype]:
            raise SystemExit(f"{name} is wrong by {error:.1e}")
    times = interleaved({"dense": lambda: F.scaled_dot_product_attention(q, k, v)} | work, 3, seconds)
    share = layout.density()
    return {name: round(share * times["dense"] / times[name], 3) for name in work}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.2, 0.5])
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=2.0, help="at least so long for each setting")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for dtype in args.dtypes:
        for D in args.dims:
            for N in args.tokens:
                for density in args.densities:
                    found = measure(N, D, dtype, density, args.heads, args.seconds)
                    setting = {"dtype": dtype, "D": D, "tokens": N, "density": density, "heads": args.heads}
                    print(setting, found, flush=True)
                    if args.out:
                        append(args.out, conditions("cpu") | setting | {"retention": found})


if __name__ == "__main__":
    main()
