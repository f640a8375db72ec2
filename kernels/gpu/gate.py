"""The compile gate: every variant of every Triton kernel against a table of what it took when it was last accepted.

The kernels are found, not listed: each module below ``patchkit.kernels`` with "triton" in its name and a function
``variants()`` takes part. Nothing here needs a GPU.
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

from .variant import Variant

ROOT = "patchkit.kernels"
# Registers a thread may take more than the table says before it counts as a fault. They are handed out in eights, and
# the assembler's choice moves by a few with every harmless edit.
REGISTER_MARGIN = 16
LAUNCH = ("num_warps", "num_stages")

Row = dict[str, Any]


class Job(NamedTuple):
    """One compile: where the variant comes from, its name, and for which GPU generation."""

    module: str
    variant: str
    target: str


def kernel_modules(root: str = ROOT) -> list[str]:
    """Names of the modules below ``root`` that can have variants; imports packages, but none of these modules."""
    package = importlib.import_module(root)
    found = pkgutil.walk_packages(package.__path__, f"{root}.")
    return sorted(m.name for m in found if "triton" in m.name.removeprefix(root))


def variants_of(module: str) -> list[Variant]:
    """The variants of one module; empty for a module that only helps others.

    Raises:
        ValueError: two variants of the same name: one row of the table could hide the other.
        RuntimeError: Triton was told to interpret kernels, so there is nothing to compile.
    """
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted and cannot be compiled; unset it")
    make = getattr(importlib.import_module(module), "variants", None)
    found: list[Variant] = list(make()) if callable(make) else []  # a folder's attribute is its module of that name
    names = [v.name for v in found]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ValueError(f"{module}: several variants are called {', '.join(twice)}")
    return found


def jobs_for(modules: Iterable[str], targets: Sequence[str], table: Iterable[Row] | None = None) -> list[Job]:
    """All compiles of some modules, or those that a table leaves over.

    Args:
        modules: from :func:`kernel_modules`.
        targets: GPU generations.
        table: accepted rows. With them only what has changed since (source, launch parameters, release of Triton) is
            compiled, and of every kernel what takes the most registers and the most shared memory on each target.
    """
    known = None if table is None else {_key(row): row for row in table}
    jobs = []
    for module in modules:
        found = variants_of(module)
        for target in targets:
            here = [v for v in found if target in v.targets]
            chosen = here if known is None else _needed(here, target, known)
            jobs += [Job(module, v.name, target) for v in chosen]
    return jobs


def _needed(variants: Sequence[Variant], target: str, known: Mapping[tuple[str, str], Row]) -> list[Variant]:
    """Variants that differ from what the table was made of, and of each kernel those closest to the target's limits."""
    from .compile import fingerprint

    chosen, kernels = set(), dict[int, list[Variant]]()
    for v in variants:
        row = known.get((v.name, target))
        if row is None or row.get("source") != fingerprint(v, target):
            chosen.add(v.name)
        else:
            kernels.setdefault(id(v.kernel), []).append(v)
    for group in kernels.values():
        for what in ("registers", "shared_bytes"):
            chosen.add(max(group, key=lambda v: known[v.name, target][what]).name)
    return [v for v in variants if v.name in chosen]


@functools.cache
def _by_name(module: str) -> dict[str, Variant]:
    return {v.name: v for v in variants_of(module)}


def compile_job(job: Job) -> Row:
    """One row of the table, with ``faults``: what the gate does not let pass. A compile that fails is a fault too."""
    from .compile import compile_variant, fingerprint

    variant = _by_name(job.module)[job.variant]
    try:
        made = compile_variant(variant, job.target)
    except Exception as error:  # the compiler raises whatever its passes raise; the table must name the variant
        told = " ".join(str(error).split())
        return {"variant": job.variant, "target": job.target, "faults": [f"does not compile: {told[-300:]}"]}
    made_of = {"triton": triton_version(), "source": fingerprint(variant, job.target)}
    return made.row() | made_of | {"faults": made.faults(variant.pipelined, variant.integer)}


def compile_all(jobs: Sequence[Job], processes: int = 2) -> list[Row]:
    """Rows of all jobs, by variant and target. Processes, because the compiler holds the interpreter's lock."""
    if processes < 2 or len(jobs) < 2:
        rows = [compile_job(job) for job in jobs]
    else:
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            rows = list(pool.map(compile_job, jobs))
    return sorted(rows, key=_key)


def compare(fresh: Iterable[Row], table: Iterable[Row]) -> list[str]:
    """What is wrong with a fresh compile, by itself and beside the table: sentences, none when all is well."""
    known = {_key(row): row for row in table}
    found = []
    for row in fresh:
        old = known.get(_key(row))
        faults = [*row.get("faults", ()), *(_worse(row, old) if old and "registers" in row else ())]
        found += [f"{row['variant']} on {row['target']}: {fault}" for fault in faults]
    return sorted(found)


def membership(jobs: Iterable[Job], table: Iterable[Row]) -> list[str]:
    """Variants that the table lacks, and rows of it that no kernel stands behind. Needs no compile."""
    there, listed = {(job.variant, job.target) for job in jobs}, {_key(row) for row in table}
    found = [f"{variant} on {target}: is not in the table" for variant, target in there - listed]
    return sorted(
        found + [f"{variant} on {target}: is in the table, but no kernel has it" for variant, target in listed - there]
    )


def _worse(row: Mapping[str, Any], old: Mapping[str, Any]) -> list[str]:
    """What got worse since the table was written. Another release of Triton makes other code: nothing to compare."""
    if row["triton"] != old.get("triton"):
        return []
    found = [f"{n} is {row[n]}, the table has {old[n]}: it is out of date" for n in LAUNCH if row[n] != old[n]]
    if found:
        return found
    if row["registers"] > old["registers"] + REGISTER_MARGIN:
        found.append(f"{row['registers']} registers, {old['registers']} in the table (margin {REGISTER_MARGIN})")
    if row["async_copies"] < old["async_copies"]:
        found.append(f"{row['async_copies']} asynchronous copies, {old['async_copies']} in the table")
    if old["tensor_core"] and not row["tensor_core"]:
        found.append("no tensor-core instruction any more")
    return found


def triton_version() -> str:
    """Release of Triton, on which registers and instructions depend."""
    from importlib.metadata import version

    return version("triton")


def _key(row: Mapping[str, Any]) -> tuple[str, str]:
    return str(row["variant"]), str(row["target"])
