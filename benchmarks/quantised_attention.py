"""Reordered, sparse and quantised attention: milliseconds, and beside them the error against fp32.

    python benchmarks/quantised_attention.py                      on a GPU: CogVideoX and Wan shapes; else small ones
    python benchmarks/quantised_attention.py --only cogvideox --densities 0.5 0.3

Rivals on a GPU: torch's dense kernels, each forced, our own dense bf16 kernel, and SageAttention 1.0.6 where it is
installed. Times include the pass that rounds and reorders; its share is measured by itself. A row without a right
result is not written. On a CPU quantisation is simulated and not timed: the sparse op with its reordering is.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# name, heads, head size, grid, text tokens in front
SHAPES = {
    "cogvideox": (48, 64, (13, 30, 45), 226),
    "wan-14b": (40, 128, (21, 45, 80), 0),
    "wan-1.3b": (12, 128, (21, 30, 52), 0),
}
SMALL = {"8k": (4, 64, (8, 32, 32), 0), "4k": (4, 64, (4, 32, 32), 226), "2k": (4, 64, (8, 16, 16), 0)}
DENSITIES = (0.5, 0.3, 0.2)
WHAT = "reordered, sparse and quantised attention"
LIMITS = {"sparse": 0.02, "int8": 0.05, "int8+int8": 0.08, "int8+fp8": 0.08, "sage 1.0.6": 0.08}


def problem(name: str, device: str, heads: int | None) -> tuple[Any, ...]:
    """q, k, v (1, H, N, D) with a channel bias on K and V, as real ones have; grid and start of the grid."""
    import torch

    H, D, grid, text = (SHAPES | SMALL)[name]
    H = heads or H
    tokens = grid[0] * grid[1] * grid[2] + text
    g = torch.Generator(device=device).manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = (torch.randn(1, H, tokens, D, generator=g, device=device, dtype=dtype) for _ in range(3))
    k[..., : D // 16] += 3
    v[..., : D // 16] -= 2
    return q, k, v, grid, text


def layout_of(tokens: int, heads: int, start: int, density: float, device: str) -> Any:
    """Random blocks at the wanted density over the image, the diagonal kept; text and ragged end complete."""
    import torch

    from patchkit.kernels import BlockLayout

    n, first, last = -(-tokens // 64), -(-start // 64), tokens // 64
    g = torch.Generator().manual_seed(1)
    keep = torch.ones(1, heads, n, n, dtype=torch.bool)
    image = torch.rand(heads, last - first, last - first, generator=g) < density
    keep[0, :, first:last, first:last] = image | torch.eye(last - first, dtype=torch.bool)
    return BlockLayout.from_bool(keep, block_q=64, block_k=64, q_len=tokens, kv_len=tokens).to(device)


def errors(
    out: Any, q: Any, k: Any, v: Any, layout: Any, codes: list[int], grid: Any, start: int
) -> tuple[float, float]:
    """Relative L1 error and norm ratio on a few query blocks of a few heads against fp32."""
    from patchkit.kernels import reorder_heads

    wrong = size = squares = wanted_squares = 0.0
    if layout is not None:
        order = {"codes": codes, "grid": grid, "start": start}
        q, k, v, out = reorder_heads(q, k, v, out.contiguous(), **order)
    N = q.shape[2]
    keep = None if layout is None else layout.to_bool()
    for h in range(0, q.shape[1], max(1, q.shape[1] // 4)):
        for p in (0, N // 128, (N - 1) // 64):
            rows = slice(p * 64, min(N, p * 64 + 64))
            s = q[0, h, rows].float() @ k[0, h].float().T * q.shape[-1] ** -0.5
            if keep is not None:
                s = s.masked_fill(~keep[0, h, p].repeat_interleave(64)[:N], float("-inf"))
            exact, found = s.softmax(-1) @ v[0, h].float(), out[0, h, rows].float()
            wrong, size = wrong + float((found - exact).abs().sum()), size + float(exact.abs().sum())
            squares, wanted_squares = (
                squares + float(found.square().sum()),
                wanted_squares + float(exact.square().sum()),
            )
    return (wrong / size if wrong == wrong else float("inf")), (squares / wanted_squares) ** 0.5


def dense_rivals(q: Any, k: Any, v: Any) -> dict[str, Callable[[], Any]]:
    """torch's kernels, ours, and SageAttention's."""
    from patchkit.kernels.bench.rivals import dense_calls

    found = dict(dense_calls(q, k, v, causal=False))
    if q.device.type == "cuda":
        try:
            from sageattention import sageattn
        except ImportError:
            print("sageattention is not installed: no row for it")
        else:
            found["sage 1.0.6"] = functools.partial(sageattn, q, k, v, is_causal=False)
    return found


def ours(q: Any, k: Any, v: Any, layout: Any, codes: list[int], grid: Any, start: int) -> dict[str, Callable[[], Any]]:
    """Our operators over ``layout`` (None = dense), reordering included."""
    from patchkit.kernels import Reorder, block_sparse_attention, quantised_attention, reorder_heads

    reorder = None if layout is None else Reorder(tuple(codes), grid, start)

    def plain() -> Any:
        order = {"codes": codes, "grid": grid, "start": start}
        moved = reorder_heads(q, k, v, **order)
        return reorder_heads(block_sparse_attention(*moved, layout, validate=False), **order, inverse=True)[0]

    found: dict[str, Callable[[], Any]] = {} if layout is None else {"sparse": plain}
    if q.device.type == "cuda":
        for qk, pv in (("int8", "none"), ("int8", "int8"), ("int8", "fp8")):
            name = qk if pv == "none" else f"{qk}+{pv}"
            found[name] = functools.partial(quantised_attention, q, k, v, layout, qk=qk, pv=pv, reorder=reorder)
    return found


def preparation(q: Any, k: Any, v: Any, codes: list[int], grid: Any, start: int) -> Callable[[], Any]:
    """The pass before attention by itself: reordering, and on a GPU the rounding with it."""
    from patchkit.kernels import Format, Reorder, reorder_heads

    if q.device.type != "cuda":
        return lambda: reorder_heads(q, k, v, codes=codes, grid=grid, start=start)
    from patchkit.kernels.quantised.triton.launch import keys_of_triton, values_of_triton

    order, form = Reorder(tuple(codes), grid, start), Format("int8", "int8")

    def prepare() -> None:
        keys_of_triton(q, k, form, (32, 64), q.shape[-1] ** -0.5, None, None, order)
        values_of_triton(v, form, 64, None, None, order, q.shape[1])

    return prepare


def measured(call: Callable[[], Any], device: str, repeats: int) -> float:
    """Median milliseconds; with one CPU thread those of the processor, which do not count what others do."""
    import statistics
    import time

    import torch

    alone = device == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    call()
    found = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        begun = clock()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append((clock() - begun) * 1e3)
    return statistics.median(found)


def run(name: str, args: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    """All rows of one shape."""
    q, k, v, grid, start = problem(name, device, args.heads)
    H, N, D = q.shape[1:]
    codes = [h % 6 for h in range(H)]
    shape = {"shape": name, "heads": H, "tokens": N, "head_dim": D, "dtype": str(q.dtype).removeprefix("torch.")}
    tera = 4 * D * H * N * N / 1e12
    found: list[dict[str, Any]] = []

    def row(kind: str, density: float, call: Callable[[], Any], layout: Any, share: float) -> None:
        try:
            error, norm = errors(call(), q, k, v, layout, codes, grid, start)
        except Exception as problem_found:  # every kernel refuses shapes and cards in its own way
            print(f"{name} {kind}: {str(problem_found)[:120]}")
            return
        if not error <= LIMITS.get(kind, 0.02) or abs(norm - 1) > 0.01:
            print(f"{name} {kind} {density}: wrong (relative L1 {error:.3g}, norm {norm:.4f}); no row")
            return
        ms = measured(call, device, args.repeats)
        entry = {"kind": kind, "density": density, "ms": round(ms, 4), "tops": round(tera * share / ms * 1e3, 2)}
        found.append(shape | entry | {"relative_l1": round(error, 5), "norm_ratio": round(norm, 5)})
        print(json.dumps(found[-1]))

    for kind, call in dense_rivals(q, k, v).items():
        row(kind, 1.0, call, None, 1.0)
    for kind, call in ours(q, k, v, None, codes, grid, start).items():
        row(kind, 1.0, call, None, 1.0)
    for density in args.densities:
        layout = layout_of(N, H, start, density, device)
        for kind, call in ours(q, k, v, layout, codes, grid, start).items():
            row(kind, density, call, layout, layout.density())
    dense = min((r["ms"] for r in found if r["density"] == 1.0), default=None)
    if dense is not None:
        ms = measured(preparation(q, k, v, codes, grid, start), device, args.repeats)
        found.append(shape | {"kind": "preparation alone", "ms": round(ms, 4), "share_of_dense": round(ms / dense, 4)})
        print(json.dumps(found[-1]))
        for entry in found:
            entry["over_best_dense"] = round(entry["ms"] / dense, 4)
    return found


def main() -> None:
    import torch
    from rows import write

    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = list(SHAPES if device == "cuda" else SMALL)
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(SHAPES | SMALL), default=names)
    parser.add_argument("--densities", type=float, nargs="+", default=list(DENSITIES))
    parser.add_argument("--heads", type=int, default=None, help="fewer heads than the model has")
    parser.add_argument("--repeats", type=int, default=20 if device == "cuda" else 5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", default="quantised_attention")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = "processor" if device == "cpu" and args.threads == 1 else "wall"
    rows = [row for name in args.only for row in run(name, args, device)]
    print(write(args.results, [{"what": WHAT, "clock": clock} | row for row in rows]))


if __name__ == "__main__":
    main()
