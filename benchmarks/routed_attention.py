"""Attention of routed heads (MoH) against dense attention on this CPU, in one process, quality beside speed.

    python benchmarks/routed_attention.py

Half of the active heads are shared, as MoH does; each token's routed heads are drawn at random. ``speedup`` is dense
SDPA over the operator, and ``of_ideal`` its share of H / (active heads): 2 at 0.5, 1.33 at 0.75. Compared calls take
turns, medians are given; the error is that against the fp32 formula on the last rows of the last KV head's group.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rows import RESULTS, append, conditions, kernels_hash
from torch import Tensor

from patchkit.kernels import routed_attention, routed_path
from patchkit.kernels.routed.reference import routed_reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
LAST = 64  # rows of the error


def routing(heads: int, active: float, n: int, generator: torch.Generator) -> tuple[Tensor, int]:
    """(1, H, N) bool and the number of shared heads: half of the active ones."""
    chosen = round(heads * active)
    shared = chosen // 2
    scores = torch.rand(1, n, heads - shared, generator=generator)
    best = scores.topk(chosen - shared, -1).indices
    routed = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
    return torch.cat([torch.ones(1, n, shared, dtype=torch.bool), routed], -1).transpose(1, 2).contiguous(), shared


def error_of(out: Tensor, q: Tensor, k: Tensor, v: Tensor, active: Tensor, shared: int, causal: bool) -> float:
    """Relative RMS error of the last rows of the last KV head's group: those that see most."""
    group = q.shape[1] // k.shape[1]
    parts = (q[:, -group:, -LAST:], k[:, -1:], v[:, -1:], active[:, -group:, -LAST:])
    wanted = routed_reference(*parts, shared=max(0, shared - q.shape[1] + group), causal=causal)
    got = out[:, -group:, -LAST:].float()
    return float((got - wanted).norm() / wanted.norm())


def turns(work: dict[str, Callable[[], Any]], count: int) -> dict[str, list[float]]:
    """Milliseconds of each call, all in turn. One thread is measured by its CPU time: others may be on the machine."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    found: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(count + 1):
        for name, call in work.items():
            begun = clock()
            call()
            if turn:
                found[name].append((clock() - begun) * 1e3)
    return found


def measure(args: argparse.Namespace, dtype: str, d: int, n: int, group: int, causal: bool) -> list[dict[str, Any]]:
    """A row for each share of active heads."""
    generator = torch.Generator().manual_seed(args.seed)
    heads = args.heads
    shapes = ((1, heads, n, d), (1, heads // group, n, d), (1, heads // group, n, d))
    q, k, v = (torch.randn(s, generator=generator).to(DTYPES[dtype]) for s in shapes)
    routes = {a: routing(heads, a, n, generator) for a in args.active}
    path = args.path
    work: dict[str, Callable[[], Any]] = {
        "dense": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    }
    for a, (active, shared) in routes.items():
        work[str(a)] = lambda active=active, shared=shared: routed_attention(
            q, k, v, active, shared=shared, causal=causal, path=path
        )
        if args.gates:
            work[f"{a} gates"] = lambda active=active, shared=shared: routed_attention(
                q, k, v, active, shared=shared, causal=causal, path="dense"
            )
    times = turns(work, args.turns)
    found = []
    for a, (active, shared) in routes.items():
        share = float(active.float().mean())
        error = error_of(work[str(a)](), q, k, v, active, shared, causal)
        dense, ours = statistics.median(times["dense"]), statistics.median(times[str(a)])
        gates = {"gates_ms": round(statistics.median(times[f"{a} gates"]), 3)} if args.gates else {}
        found.append(
            {
                "benchmark": "routed_attention",
                "heads": heads,
                "kv_heads": heads // group,
                "shared": shared,
                "N": n,
                "D": d,
                "dtype": dtype,
                "causal": causal,
                "active": round(share, 4),
                "path": path or routed_path(q, k, active, shared).name,
                "clock": "cpu" if torch.get_num_threads() == 1 else "wall",
                "dense_ms": round(dense, 3),
                **gates,
                "ms": round(ours, 3),
                "low_ms": round(min(times[str(a)]), 3),
                "high_ms": round(max(times[str(a)]), 3),
                "turns": args.turns,
                "speedup": round(dense / ours, 3),
                "of_ideal": round(share * dense / ours, 3),
                "relative_rms_error": float(f"{error:.1e}"),
                "passed": error <= TOLERANCE[dtype],
            }
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--group", type=int, nargs="+", default=[1, 4], help="query heads of a KV head")
    parser.add_argument("--active", type=float, nargs="+", default=[0.5, 0.75])
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--causal", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--path", choices=["dense", "blocked"], help="instead of the one that is chosen")
    parser.add_argument("--turns", type=int, default=9, help="of each of the compared calls")
    parser.add_argument("--gates", action="store_true", help="time dense attention times the gates as well")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry", action="store_true", help="write no rows")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    failed = 0
    settings = itertools.product(args.dtype, args.tokens, args.head_dim, args.group, map(bool, args.causal))
    for dtype, n, d, group, causal in settings:
        load = os.getloadavg()[0]
        for row in measure(args, dtype, d, n, group, causal):
            print(
                f"{dtype} N {n:5} D {d:3} GQA {group} {'causal' if causal else 'full  '} active {row['active']:.2f} "
                f"{row['path']:7} {row['dense_ms']:9.1f} -> {row['ms']:9.1f} ms: "
                f"{row['speedup']:.2f}x, {row['of_ideal']:.0%} of ideal, error {row['relative_rms_error']:.0e}",
                flush=True,
            )
            if not row.pop("passed"):
                failed += 1
                print("  wrong result: row not written")
            elif not args.dry:
                facts = conditions("cpu") | {"load_before": load, "load_after": os.getloadavg()[0]}
                append(RESULTS / "routed_attention.jsonl", facts | {"kernels": kernels_hash()} | row)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
