"""Block-sparse attention against torch's own dense attention on this CPU, in one process, quality beside speed.

One JSON line per (dtype, D, N, density): retention = density * t_dense / t_sparse (1.0: every skipped block is a full
gain), the cost of the block-mass search in dense calls, and the relative RMS error against the masked softmax in fp32.
A row is written only if that error passes. Timings of one setting are interleaved and their minimum is taken, so that
other work on the machine disturbs all of them alike; run it on a quiet machine for absolute figures.

    python benchmarks/block_sparse_cpu.py --out benchmarks/results/block_sparse_cpu.jsonl --threads 2
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rows import conditions
from torch import Tensor

from patchkit.kernels import BlockLayout, block_mass, block_sparse_attention, choose_path, dense_attention
from patchkit.kernels.sparse.reference import block_sparse_reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 2e-3}


def interleaved(work: dict[str, Callable[[], Any]], repeats: int, seconds: float) -> dict[str, float]:
    """Minimum milliseconds of each entry over at least ``repeats`` rounds and ``seconds``, at most 20 rounds."""
    best = dict.fromkeys(work, float("inf"))
    started = time.perf_counter()
    for _ in range(20):
        for name, call in work.items():
            t = time.perf_counter()
            call()
            best[name] = min(best[name], (time.perf_counter() - t) * 1e3)
        repeats -= 1
        if repeats <= 0 and time.perf_counter() - started > seconds:
            break
    return best


def local_mass(heads: int, n: int, generator: torch.Generator) -> Tensor:
    """Block masses that decay with distance: selections with runs, as video attention maps have them."""
    i = torch.arange(n)
    distance = (i[:, None] - i).abs().float() / n
    return torch.exp(-12 * distance) * (0.3 + torch.rand(1, heads, n, n, generator=generator))


def error_of(out: Tensor, q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout) -> float:
    """Relative RMS error of the last four query blocks of head 0 in each sample (the reference is slow)."""
    blocks = min(4, layout.n_q)
    rows = layout.q_len - (layout.n_q - blocks) * layout.block_q
    keep = layout.to_bool()[:, :1, -blocks:]
    part = BlockLayout.from_bool(keep, block_q=layout.block_q, block_k=layout.block_k, q_len=rows, kv_len=layout.kv_len)
    expected, _ = block_sparse_reference(*(x.float() for x in (q[:, :1, -rows:], k[:, :1], v[:, :1])), part)
    got = out[:, :1, -rows:].double()
    return float((got - expected.double()).norm() / expected.double().norm())


def make_layout(args: argparse.Namespace, N: int, density: float, g: torch.Generator) -> BlockLayout:
    """Kept blocks of every sample and head; pattern "text" is what AdaSpa keeps of a short video."""
    n = -(-N // args.block)
    sizes = {"block_q": args.block, "block_k": args.block, "q_len": N, "kv_len": N}
    if args.pattern == "local":
        return BlockLayout.from_topk(local_mass(args.heads, n, g), max(1, round(density * n)), **sizes)
    masses = torch.rand(args.batch, args.heads, n, n, generator=g)
    if args.pattern == "random":
        return BlockLayout.from_topk(masses, max(1, round(density * n)), **sizes)
    # The first block is text: seen by all, sees all. Heads keep half, one and one and a half times the density.
    text = torch.zeros(n, n, dtype=torch.bool)
    text[0], text[:, 0] = True, True
    share = torch.tensor([0.5, 1.0, 1.5])[torch.arange(args.heads) % 3] * density
    return BlockLayout.from_topk(masses, (share * (n - 1)).round().clamp(1, n - 1).long()[None], text, **sizes)


def measure(args: argparse.Namespace, dtype: str, D: int, N: int) -> list[dict[str, Any]]:
    g = torch.Generator().manual_seed(args.seed)
    q, k, v = (torch.randn(args.batch, args.heads, N, D, generator=g).to(DTYPES[dtype]) for _ in range(3))
    _, lse = dense_attention(q, k, v, return_lse=True)
    layouts = {d: make_layout(args, N, d, g) for d in args.density}
    work: dict[str, Callable[[], Any]] = {
        "dense": lambda: F.scaled_dot_product_attention(q, k, v),
        "mass": lambda: block_mass(q, k, lse, args.block, args.block),
    }
    for d, layout in layouts.items():
        work[str(d)] = lambda layout=layout: block_sparse_attention(q, k, v, layout)
    times = interleaved(work, args.repeats, args.seconds)
    rows = []
    for d, layout in layouts.items():
        error = error_of(block_sparse_attention(q, k, v, layout), q, k, v, layout)
        path = choose_path(layout, D, DTYPES[dtype])
        rows.append(
            {
                **conditions(),
                "load_before": args.load,
                "load_after": os.getloadavg()[0],
                "B": args.batch,
                "H": args.heads,
                "N": N,
                "D": D,
                "block": args.block,
                "pattern": args.pattern,
                "dtype": dtype,
                "density": round(layout.density(), 4),
                "dense_ms": round(times["dense"], 3),
                "sparse_ms": round(times[str(d)], 3),
                "retention": round(layout.density() * times["dense"] / times[str(d)], 3),
                "speedup": round(times["dense"] / times[str(d)], 3),
                "path": path.name,
                "pays": path.pays,
                "mass_over_dense": round(times["mass"] / times["dense"], 3),
                "relative_rms_error": error,
                "passed": error <= TOLERANCE[dtype],
            }
        )
    return rows


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['dtype']:5}  {row['D']:<4} {row['N']:<6} {row['density']:<8} {row['dense_ms']:<9.1f} "
        f"{row['sparse_ms']:<10.1f} {row['retention']:<10.2f} {row['mass_over_dense']:<11.2f} "
        f"{row['relative_rms_error']:.1e}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="append JSON lines here; without it rows are only printed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument(
        "--pattern", choices=["random", "local", "text"], default="random", help="random is the hardest case"
    )
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["fp32", "bf16"])
    parser.add_argument("--head-dim", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 4096, 8192, 16384])
    parser.add_argument("--density", nargs="+", type=float, default=[0.1, 0.2, 0.5])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="keep repeating short settings for this long")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.load = os.getloadavg()[0]
    failed = 0
    print("dtype  D    N      density  dense ms  sparse ms  retention  mass/dense  error")
    for dtype in args.dtype:
        for D in args.head_dim:
            for N in args.tokens:
                for row in measure(args, dtype, D, N):
                    show(row)
                    if not row.pop("passed"):
                        failed += 1
                        print("  wrong result: row not written")
                    elif args.out is not None:
                        args.out.parent.mkdir(parents=True, exist_ok=True)
                        with args.out.open("a") as f:
                            f.write(json.dumps(row) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
