"""What every Triton kernel takes on GPUs that are not here: registers, spills, shared memory, pipelined loads.

    python benchmarks/compile_kernels.py                 compile everything, rewrite results/compile.jsonl
    python benchmarks/compile_kernels.py --check         compile what has changed since and what is tightest, compare
                                                         with the table, exit 1 on a fault
    python benchmarks/compile_kernels.py --check --all   compile everything and compare

A row tells by its ``source`` what it was made of: kernel, argument types, launch parameters, release of Triton.
Rewrite the table whenever a kernel or its launch parameters change on purpose, and read the difference.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from rows import RESULTS

from patchkit.kernels.gpu import gate

TABLE = RESULTS / "compile.jsonl"
TARGETS = ("sm90", "sm80", "sm120")
COLUMNS = ("registers", "spill_bytes", "shared_bytes", "async_copies", "tensor_core", "num_warps", "num_stages")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def show(rows: list[dict[str, Any]]) -> None:
    width = max(len("variant"), *(len(r["variant"]) for r in rows))
    print(f"{'variant':{width}}  target  regs  spills  shared   async  mma  warps  stages")
    for r in rows:
        if "registers" not in r:
            print(f"{r['variant']:{width}}  {r['target']:6}  {'; '.join(r['faults'])}")
            continue
        regs, spills, shared, copies, mma, warps, stages = (r[c] for c in COLUMNS)
        print(
            f"{r['variant']:{width}}  {r['target']:6}  {regs:4}  {spills:6}  {shared:7}  {copies:5}  {mma:3}  "
            f"{warps:5}  {stages:6}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the table instead of rewriting it")
    parser.add_argument("--all", action="store_true", help="with --check: also what has not changed")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--only", default="", help="modules with this text in their name, such as sparse")
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    modules = [m for m in gate.kernel_modules() if args.only in m]
    table = read(args.table)
    jobs = gate.jobs_for(modules, args.targets, table if args.check and not args.all else None)
    if not jobs:
        print(f"no variants in {modules or 'any module'}", file=sys.stderr)
        return 2
    begun = time.perf_counter()
    fresh = gate.compile_all(jobs, args.processes)
    show(fresh)
    print(f"{len(jobs)} compiles in {time.perf_counter() - begun:.0f} s with {args.processes} processes")
    if args.check:
        faults = gate.compare(fresh, table)
        if not args.only:
            faults += gate.membership(gate.jobs_for(modules, TARGETS), table)
    else:
        faults = [f"{r['variant']} on {r['target']}: {fault}" for r in fresh for fault in r["faults"]]
        write(args.table, fresh, [] if len(jobs) == len(gate.jobs_for(gate.kernel_modules(), TARGETS)) else table)
        print(args.table)
    for fault in faults:
        print(f"FAULT {fault}", file=sys.stderr)
    if faults and args.check:
        print("if this is meant: python benchmarks/compile_kernels.py rewrites the table", file=sys.stderr)
    return 1 if faults else 0


def write(path: Path, fresh: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    """Replace the table; of ``others``, rows that were compiled anew give way."""
    rows = {(r["variant"], r["target"]): r for r in [*others, *fresh]}
    lines = [json.dumps({k: v for k, v in rows[key].items() if k != "faults"}) for key in sorted(rows)]
    path.write_text("".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    raise SystemExit(main())
