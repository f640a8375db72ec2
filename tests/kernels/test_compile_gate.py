"""Every Triton kernel compiles for three GPU generations as the table says, and the gate fails where it must.

In subprocesses: other tests of this run may have turned on Triton's interpreter, under which nothing is compiled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from patchkit.kernels.gpu import gate

ROOT = Path(__file__).resolve().parents[2]
ROW = {
    "variant": "a",
    "target": "sm90",
    "registers": 100,
    "spill_bytes": 0,
    "shared_bytes": 1,
    "async_copies": 8,
    "tensor_core": 16,
    "num_warps": 4,
    "num_stages": 2,
    "triton": "3.6.0",
    "faults": [],
}


def compiling(*command, **extra):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | extra
    return subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_every_kernel_compiles_as_the_table_says():
    """What has changed since the table was written, and the tightest; everything where PATCHKIT_COMPILE_ALL is set."""
    everything = ["--all"] if os.environ.get("PATCHKIT_COMPILE_ALL") else []
    done = compiling(ROOT / "benchmarks" / "compile_kernels.py", "--check", *everything)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr


def test_the_gate_names_what_a_bad_kernel_lost():
    code = (
        "import json; from patchkit.kernels.gpu import gate; "
        "rows = gate.compile_all(gate.jobs_for(['bad_triton'], ['sm90']), 1); "
        "print(json.dumps([rows, gate.compare(rows, [])]))"
    )
    done = compiling("-c", code, PYTHONPATH=str(Path(__file__).parent))
    assert done.returncode == 0, done.stderr
    rows, faults = json.loads(done.stdout)
    found = {row["variant"]: " ".join(row["faults"]) for row in rows}
    assert found["sound"] == ""
    assert "spills" in found["huge tile"]
    assert "no asynchronous copies" in found["one stage"]
    assert "does not compile" in found["nonsense"]
    assert len([f for f in faults if f.startswith("sound")]) == 0
    assert len(faults) >= 3


def test_nothing_is_compiled_under_the_interpreter():
    code = "from patchkit.kernels.gpu import gate; gate.jobs_for(['bad_triton'], ['sm90'])"
    done = compiling("-c", code, PYTHONPATH=str(Path(__file__).parent), TRITON_INTERPRET="1")
    assert done.returncode == 1
    assert "TRITON_INTERPRET is set" in done.stderr


def test_the_same_is_no_fault():
    assert gate.compare([ROW], [ROW]) == []
    assert gate.compare([ROW | {"registers": 100 + gate.REGISTER_MARGIN}], [ROW]) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"registers": 101 + gate.REGISTER_MARGIN}, "117 registers, 100 in the table"),
        ({"async_copies": 4}, "4 asynchronous copies, 8 in the table"),
        ({"tensor_core": 0}, "no tensor-core instruction any more"),
        ({"num_warps": 8}, "num_warps is 8, the table has 4"),
        ({"faults": ["spills 4 bytes"]}, "a on sm90: spills 4 bytes"),
    ],
)
def test_what_got_worse_is_named(change, words):
    (fault,) = gate.compare([ROW | change], [ROW])
    assert words in fault


def test_another_triton_is_judged_by_itself_alone():
    other = ROW | {"triton": "9.9", "registers": 200}
    assert gate.compare([other], [ROW]) == []
    assert gate.compare([other | {"faults": ["spills 4 bytes"]}], [ROW]) != []


def test_a_variant_that_came_or_went_is_named():
    jobs = [gate.Job("m", "a", "sm90"), gate.Job("m", "b", "sm90")]
    assert gate.membership(jobs, [ROW]) == ["b on sm90: is not in the table"]
    (fault,) = gate.membership(jobs[1:], [ROW, ROW | {"variant": "b"}])
    assert "a on sm90: is in the table, but no kernel has it" in fault


def test_shared_memory_beyond_the_card_is_a_fault():
    """102,400 bytes: fine on sm90, too much for consumer Blackwell."""
    from patchkit.kernels.gpu.compile import Compiled

    made = {t: Compiled("a", t, 100, 0, 102400, 8, 8, 4, 2).faults(pipelined=True) for t in ("sm90", "sm120")}
    assert made["sm90"] == []
    assert "102400 bytes of shared memory, 101376 are there" in made["sm120"][0]


def test_what_has_changed_and_what_is_tightest(monkeypatch):
    """Of one kernel with variants a to f: most registers, most shared memory, a changed and an unknown one."""
    from patchkit.kernels.gpu import Variant, compile

    kernel = object()
    monkeypatch.setattr(gate, "variants_of", lambda module: [Variant(n, kernel, {}, {}) for n in "abcdef"])
    monkeypatch.setattr(compile, "fingerprint", lambda variant, target: f"{variant.name} {target}")
    figures = {"a": (50, 10), "b": (90, 10), "c": (60, 99), "d": (70, 70), "f": (50, 10)}
    table = [
        {"variant": n, "target": t, "registers": r, "shared_bytes": s, "source": f"{n} {t}" if n != "f" else "before"}
        for n, (r, s) in figures.items()
        for t in ("sm90", "sm120")
    ]
    jobs = gate.jobs_for(["m"], ["sm90", "sm120"], table)
    for target in ("sm90", "sm120"):
        assert [j.variant for j in jobs if j.target == target] == ["b", "c", "e", "f"]
    assert len(gate.jobs_for(["m"], ["sm90", "sm120"])) == 12


def test_a_fingerprint_follows_all_that_machine_code_depends_on():
    code = (
        "import dataclasses, json, bad_triton; from patchkit.kernels.gpu.compile import fingerprint; "
        "one = bad_triton.variants()[0]; "
        "others = [dataclasses.replace(one, num_warps=8), dataclasses.replace(one, num_stages=1), "
        "dataclasses.replace(one, loose=frozenset(one.types)), bad_triton.variants()[1]]; "
        "every = [(one, 'sm90'), (one, 'sm80'), *((other, 'sm90') for other in others)]; "
        "print(json.dumps([fingerprint(*each) for each in every]))"
    )
    first, second = (compiling("-c", code, PYTHONPATH=str(Path(__file__).parent)) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    found = json.loads(first.stdout)
    assert len(set(found)) == len(found)
