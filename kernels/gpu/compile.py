"""Compiling kernels for GPUs that are not there: registers, spills, shared memory and asynchronous copies.

``triton.compile`` needs no device, and the assembler that comes with Triton tells what the machine code takes. So each
change to a kernel can be checked for lost pipelining or spilled registers without a GPU.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .variant import Variant

TARGETS = {"sm80": 80, "sm90": 90, "sm120": 120}
# Shared memory a block can have, in bytes. sm120 (consumer Blackwell) has as little as consumer Ampere.
SHARED_LIMIT = {"sm80": 166912, "sm90": 232448, "sm120": 101376}


@dataclass(frozen=True)
class Compiled:
    """What one variant takes on one GPU generation.

    Attributes:
        registers: per thread.
        spill_bytes: stores to local memory for want of registers, per thread.
        shared_bytes: shared memory per program.
        async_copies: ``cp.async`` or bulk (TMA) copy instructions: pipelined loads.
        tensor_core: matrix instructions (``mma.sync`` or ``wgmma``).
    """

    variant: str
    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    async_copies: int
    tensor_core: int
    num_warps: int
    num_stages: int
    integer: int = 0  # of the matrix instructions those of 8-bit integers

    def faults(self, pipelined: bool, integer: bool = False) -> list[str]:
        """What the gate does not let pass."""
        found = []
        if self.spill_bytes:
            found.append(f"spills {self.spill_bytes} bytes")
        if self.shared_bytes > SHARED_LIMIT[self.target]:
            found.append(f"{self.shared_bytes} bytes of shared memory, {SHARED_LIMIT[self.target]} are there")
        if pipelined and not self.async_copies:
            found.append("no asynchronous copies: pipelining is lost")
        if integer and not self.integer:
            found.append("no matrix instruction of 8-bit integers")
        return found

    def row(self) -> dict[str, Any]:
        """As a row of the table."""
        return asdict(self)


def compile_variant(variant: Variant, target: str) -> Compiled:
    """Compile ``variant`` for ``target`` ("sm80", "sm90", "sm120") and measure the result.

    Raises:
        triton.CompilationError: the kernel does not compile.
        subprocess.CalledProcessError: the assembler refuses the result.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    made = triton.compile(_source(variant), target=GPUTarget("cuda", TARGETS[target], 32), options=_options(variant))
    ptx = made.asm["ptx"]
    registers, spills = _assemble(ptx)
    return Compiled(
        variant=variant.name,
        target=target,
        registers=registers,
        spill_bytes=spills,
        shared_bytes=int(made.metadata.shared),
        async_copies=len(re.findall(r"cp\.async\.(?:ca|cg|bulk)", ptx)),
        tensor_core=len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async)", ptx)),
        num_warps=variant.num_warps,
        num_stages=variant.num_stages,
        integer=len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async)[\w.:]*\.s8", ptx)),
    )


def fingerprint(variant: Variant, target: str) -> str:
    """Of all that the machine code depends on: equal ones need no second compile. Compiles nothing."""
    import triton

    parts = _source(variant).hash(), json.dumps(_options(variant)), target, triton.__version__
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def _options(variant: Variant) -> dict[str, int]:
    return {"num_warps": variant.num_warps, "num_stages": variant.num_stages}


def _source(variant: Variant) -> Any:
    """What Triton's compiler is given."""
    from triton.compiler import ASTSource

    names = list(variant.kernel.arg_names)
    missing = [n for n in names if n not in variant.types and n not in variant.constants]
    if missing:
        raise ValueError(f"{variant.name}: no type or value for {', '.join(missing)}")
    signature = {n: variant.types.get(n, "constexpr") if n not in variant.constants else "constexpr" for n in names}
    aligned = [i for i, n in enumerate(names) if signature[n] not in ("constexpr", "fp32") and n not in variant.loose]
    return ASTSource(
        fn=variant.kernel,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in variant.constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )


def _assemble(ptx: str) -> tuple[int, int]:
    """(registers, spilled bytes) of the largest kernel in ``ptx``, from the assembler's verbose output."""
    from triton import knobs

    (arch,) = re.findall(r"^\.target\s+(\w+)", ptx, re.MULTILINE)
    new = int(re.findall(r"\d+", arch)[0]) >= 100
    tool = knobs.nvidia.ptxas_blackwell if new and hasattr(knobs.nvidia, "ptxas_blackwell") else knobs.nvidia.ptxas
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx, encoding="utf-8")
        command = [tool.path, "-v", f"--gpu-name={arch}", source, "-o", Path(folder) / "kernel.cubin"]
        done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
    text = done.stdout + done.stderr
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", text))
    spills = max((int(n) for n in re.findall(r"(\d+) bytes spill stores", text)), default=0)
    return registers, spills
