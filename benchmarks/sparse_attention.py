"""Block-sparse attention beside torch's dense kernels and FlexAttention, on the shapes of real models. One process.

    python benchmarks/sparse_attention.py                                    on a GPU: everything, resumable
    python benchmarks/sparse_attention.py --shapes wan-14b --density 0.2 --no-flex
    python benchmarks/sparse_attention.py --smoke                            anywhere: small shapes, nothing written

A row is written only if its result is right. Rows that are there already for the same kernels, card, driver and
versions are skipped; a run that is stopped, or that reaches --minutes, is taken up by the next. NOTES.md says how it is
measured. Needs patchkit.kernels only.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rows import RESULTS, append, conditions, kernels_hash, lasting, read

from patchkit.kernels import KernelValueError
from patchkit.kernels.bench import MODELS, Bench, Shape
from patchkit.kernels.bench.patterns import PATTERNS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OUT = RESULTS / "sparse_attention.jsonl"
SMOKE = {"tokens": 700, "heads": 2}
COLUMNS = (  # title, width, format, entry of the row
    ("shape", 14, "", "shape"),
    ("pattern", 8, "", "pattern"),
    ("block", 6, "", "block"),
    ("asked", 6, "", "density_asked"),
    ("kept", 6, ".3f", "density"),
    ("path", 8, "", "path"),
    ("dense", 10, "", "dense"),
    ("dense ms", 9, ".4g", "dense_ms"),
    ("sparse ms", 10, ".4g", "sparse_ms"),
    ("TFLOP/s", 8, ".4g", "sparse_tflops"),
    ("retention", 10, ".2f", "retention"),
    ("flex", 5, ".2f", "flex_retention"),
    ("search", 7, ".2f", "search_over_dense"),
    ("error", 8, ".1e", "error"),
)


class Point(NamedTuple):
    """What one row is about; with the conditions it is the row's identity."""

    shape: Shape
    dtype: str
    pattern: str
    block: int
    density: float

    def key(self) -> dict[str, Any]:
        """As the row says it."""
        s = self.shape
        return {
            "shape": s.name,
            "batch": s.batch,
            "heads": s.heads,
            "kv_heads": s.shared_heads,
            "tokens": s.tokens,
            "text": s.text,
            "head_dim": s.head_dim,
            "causal": s.causal,
            "dtype": str(DTYPES[self.dtype]).removeprefix("torch."),
            "pattern": self.pattern,
            "block": self.block,
            "density_asked": self.density,
        }


def points(args: argparse.Namespace) -> Iterator[tuple[Shape, str, list[Point]]]:
    for name in args.shapes:
        shape = MODELS[name]
        if args.smoke:
            shape = shape.smaller(**SMOKE)
        elif args.heads:
            group = shape.heads // shape.shared_heads
            kv_heads = args.heads // group if args.heads % group == 0 else 1
            shape = dataclasses.replace(shape, heads=args.heads, kv_heads=kv_heads)
        for dtype in args.dtype:
            found = [Point(shape, dtype, p, b, d) for p in args.pattern for b in args.block for d in args.density]
            yield shape, dtype, found


def show(row: dict[str, Any] | None = None) -> None:
    """One line of the table; without a row its head."""
    cells = []
    for title, width, form, name in COLUMNS:
        value: Any = title if row is None else row.get(name, "-")
        cells.append(f"{format(value, form if isinstance(value, int | float) else ''):{width}}")
    print(" ".join(cells).rstrip(), flush=True)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=MODELS, default=[n for n in MODELS if n != "wan-1.3b"])
    parser.add_argument("--density", nargs="+", type=float, default=[0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0])
    parser.add_argument("--block", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--pattern", nargs="+", choices=PATTERNS, default=list(PATTERNS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--heads", type=int, help="fewer heads than the model has, for small cards")
    parser.add_argument("--flex", action=argparse.BooleanOptionalAction, default=True, help="FlexAttention as well")
    parser.add_argument("--seconds", type=float, default=0.3, help="how long each entry is timed, about")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin no row after this time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--smoke", action="store_true", help="small shapes, fp32, nothing written")
    return parser.parse_args()


def main() -> int:
    args = options()
    if args.smoke:
        args.dtype, args.flex, args.seconds = ["fp32"], False, 0.0
    elif not args.device.startswith("cuda"):
        print("these shapes take a GPU; --smoke tries the benchmark anywhere, block_sparse_cpu.py measures CPUs")
        return 2
    begun, failed, written, left = time.monotonic(), 0, 0, 0
    shared = conditions(args.device) | {"kernels": kernels_hash()}
    known = [] if args.smoke else read(args.out)
    show()
    for shape, dtype, wanted in points(args):
        todo = [p for p in wanted if not any(_same(row, lasting(shared) | p.key(), args.flex) for row in known)]
        if not todo:
            print(f"{shape.name}: all {len(wanted)} rows are there")
            continue
        if time.monotonic() - begun > 60 * args.minutes:
            left += len(todo)
            continue
        try:
            bench = Bench(shape, DTYPES[dtype], args.device, seconds=args.seconds, flex=args.flex)
        except (KernelValueError, torch.OutOfMemoryError) as error:
            print(f"{shape.name}: {error}")
            failed += 1
            continue
        for name, reason in bench.missing.items():
            print(f"{shape.name}: {name} {reason}")
        for point in todo:
            if time.monotonic() - begun > 60 * args.minutes:
                left += 1
                continue
            try:
                row = bench.row(point.block, point.density, point.pattern)
            except torch.OutOfMemoryError as error:
                print(f"{shape.name} at {point.density}, blocks of {point.block}: {str(error)[:120]}")
                failed += 1
                continue
            show(row)
            if not row.pop("passed"):
                failed += 1
                print("  wrong result: row not written")
            elif not args.smoke:
                append(args.out, conditions(args.device) | {"kernels": kernels_hash()} | row)
                written += 1
        del bench
    print(f"{written} rows written, {failed} failed, {left} left for the next run, {time.monotonic() - begun:.0f} s")
    return 1 if failed else 0


def _same(row: dict[str, Any], wanted: dict[str, Any], flex: bool) -> bool:
    measured = not flex or "flex_ms" in row or "flex" in row
    return measured and all(row.get(name) == value for name, value in wanted.items())


if __name__ == "__main__":
    raise SystemExit(main())
