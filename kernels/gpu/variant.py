"""A kernel together with everything that its machine code depends on: what the compile gate goes through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One compiled form of a Triton kernel, as a launch would make it.

    Args:
        name: what it is for, unique: ``"sparse.forward D128 bf16 64x64"``.
        kernel: the ``@triton.jit`` function.
        types: run-time argument -> Triton type (``"*bf16"``, ``"*i16"``, ``"i32"``, ``"fp32"``), in any order.
        constants: compile-time argument -> value; also run-time arguments that are None or 1 in such a launch.
        num_warps: warps per program.
        num_stages: stages of software pipelining.
        pipelined: whether the main loop must load asynchronously (``cp.async``); the gate fails when it does not.
        loose: arguments that are not multiples of 16. All other pointers and integers are compiled as divisible by
            16, as Triton specialises aligned tensors and strides.
        targets: GPU generations that are launched in this form, for launch parameters that differ between them.
        integer: whether it must multiply 8-bit integers on the tensor cores; the gate fails when it does not.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    pipelined: bool = True
    loose: frozenset[str] = field(default_factory=frozenset)
    targets: tuple[str, ...] = ("sm80", "sm90", "sm120")
    integer: bool = False
