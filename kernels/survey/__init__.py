"""Which implementation each operator takes on a device and why, whether it runs, and how far off its result is."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..bench.accuracy import TOLERANCE
from ..dense import dense_attention
from ..dense.reference import dense_attention_reference
from ..gpu import obstacle
from ..layout import BlockLayout
from ..mass import block_mass
from ..mass.reference import block_mass_reference
from ..merge import merge_states
from ..quantised import Format, quantised_attention
from ..quantised.reference import quantised_reference
from ..reorder import reorder_heads
from ..reorder.reference import reorder_reference
from ..sparse import block_sparse_attention, choose_path
from ..sparse.reference import block_sparse_reference
from ..statistics import block_statistics
from ..statistics.reference import block_statistics_reference
from ..topk import row_topk
from . import language
from .problem import BLOCK, LONG, TOKENS, D, Operator, Problem, Tensors, example, path_of

# Gradients go through one more product of rounded numbers.
BACKWARD = 4.0


class Check(NamedTuple):
    """One operator in one dtype.

    Args:
        error: relative RMS error against the fp32 reference on the same inputs; None when it did not run.
        first_ms: the first call, which compiles.
        later_ms: the second.
        failure: what is wrong, None when all is well.
    """

    error: float | None
    first_ms: float
    later_ms: float
    failure: str | None


@dataclass(frozen=True)
class Finding:
    """What became of one operator on one device.

    Args:
        operator: its name.
        path: the implementation it takes.
        reason: why that one.
        checks: dtype -> what a call in it gave.
    """

    operator: str
    path: str
    reason: str
    checks: Mapping[str, Check] = field(default_factory=dict)

    @property
    def failures(self) -> dict[str, str]:
        """Dtype -> what went wrong there."""
        return {dtype: check.failure for dtype, check in self.checks.items() if check.failure}

    def __str__(self) -> str:
        worst = [check.error for check in self.checks.values() if check.error is not None]
        error = f"relative error {self.checks['float32'].error:.0e}" if "float32" in self.checks and worst else "failed"
        return f"{self.path}: {self.reason} ({error})"


def survey(device: torch.device | str = "cpu") -> list[Finding]:
    """Run every operator on ``device`` once in fp32, fp16 and bf16, and compare it with its fp32 reference."""
    device = torch.device(device)
    with contextlib.suppress(Exception):  # torch's own first-time costs are no operator's; what fails is found below
        _dense(example(torch.float32, device))
    return [
        Finding(name, *why(device), checks={str(t).removeprefix("torch."): _check(name, t, device) for t in dtypes})
        for name, (why, dtypes, _, _) in _operators().items()
    ]


def paths(device: torch.device | str = "cpu") -> dict[str, str]:
    """Operator -> the path it takes on ``device``, why, and its error in fp32; one line each."""
    return {finding.operator: str(finding) for finding in survey(device)}


def _operators() -> dict[str, Operator]:
    """Operator -> (device -> (path, reason), dtypes, the operator, its reference)."""
    every = tuple(TOLERANCE)
    found: dict[str, Operator] = {
        "dense_attention": (_dense_path, every, _dense, _dense_exact),
        "block_sparse_attention": (_sparse_path, every, _sparse, _sparse_exact),
        "block_sparse_attention, backward": (_backward_path, every, _backward, _backward_exact),
        "block_mass": (path_of("mass.triton"), every, _mass, _mass_exact),
        "block_statistics": (path_of("statistics.triton"), every, _statistics, _statistics_exact),
        "reorder_heads": (path_of("reorder.triton"), every, _reorder, _reorder_exact),
        "quantised_attention": (path_of("quantised.triton.launch"), every, _quantised, _quantised_exact),
        "merge_states": (lambda device: ("plain torch", "elementwise on any device"), every, _merge, _dense_exact),
    }
    found["row_topk"] = (path_of("topk.triton"), (torch.float32,), _topk, _topk_exact)
    return found | language.operators(every)


def _check(name: str, dtype: torch.dtype, device: torch.device) -> Check:
    """Solve the small problem twice. Whatever the operator raises is a finding: that is what this is for."""
    _, _, solve, reference = _operators()[name]
    problem = example(dtype, device)
    limit = TOLERANCE[dtype] * (BACKWARD if "backward" in name else 1)
    seconds = []
    try:
        for _ in range(2):
            begun = time.perf_counter()
            found = solve(problem)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - begun)
        error = _error(found, reference(problem.exact))
    except Exception as problem_found:
        told = " ".join(str(problem_found).split())[:300]
        return Check(None, 0.0, 0.0, f"{type(problem_found).__name__}: {told}")
    wrong = None if error <= limit else f"relative error {error:.1e}, allowed is {limit:.0e}"
    return Check(error, round(seconds[0] * 1e3, 1), round(seconds[1] * 1e3, 1), wrong)


def _error(found: Tensors, wanted: Tensors) -> float:
    """The largest relative RMS error; infinite where something is NaN."""
    worst = 0.0
    for a, b in zip(found, wanted, strict=True):
        relative = float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-12))
        worst = max(worst, relative if relative == relative else float("inf"))
    return worst


# --- paths ---------------------------------------------------------------------------------------------------------


def _dense_path(device: torch.device) -> tuple[str, str]:
    return "torch", "the kernel that torch itself chooses, asked for its log-sum-exp"


def _sparse_path(device: torch.device) -> tuple[str, str]:
    n = LONG // BLOCK
    layout = BlockLayout.from_predicate(
        lambda p, j: (p - j).abs() < n // 10, block_q=BLOCK, block_k=BLOCK, q_len=LONG, kv_len=LONG
    )
    path = choose_path(layout, D, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    missing = obstacle(device)
    return path.name, missing if missing and path.name == "blocked" else path.reason


def _backward_path(device: torch.device) -> tuple[str, str]:
    return path_of("sparse.triton.backward_launch")(device)


# --- operators and their references ----------------------------------------------------------------------------------


def _dense(p: Problem) -> Tensors:
    return dense_attention(p.q, p.k, p.v, return_lse=True, enable_gqa=True)


def _dense_exact(p: Problem) -> Tensors:
    return dense_attention_reference(p.q, p.k, p.v)


def _sparse(p: Problem) -> Tensors:
    return block_sparse_attention(p.q, p.k, p.v, p.layout, return_lse=True)


def _sparse_exact(p: Problem) -> Tensors:
    return block_sparse_reference(p.q, p.k, p.v, p.layout)


def _backward(p: Problem) -> Tensors:
    return _gradients(p, lambda q, k, v: block_sparse_attention(q, k, v, p.layout))


def _backward_exact(p: Problem) -> Tensors:
    mask = p.layout.element_mask()
    return _gradients(p, lambda q, k, v: dense_attention(q, k, v, mask=mask, enable_gqa=True))


def _gradients(p: Problem, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensors:
    with torch.enable_grad():
        leaves = [x.detach().clone().requires_grad_() for x in (p.q, p.k, p.v)]
        out = attend(*leaves)
        return torch.autograd.grad(out, leaves, torch.sin(out.detach().float() * 50).to(out.dtype))


def _mass(p: Problem) -> Tensors:
    return block_mass(p.q, p.k, _dense_exact(p.exact)[1], BLOCK, BLOCK, return_row_sum=True)


def _mass_exact(p: Problem) -> Tensors:
    return block_mass_reference(p.q, p.k, _dense_exact(p)[1], BLOCK, BLOCK)


ORDER = {"codes": (2, 5), "grid": (7, 6, 5), "start": 20}


def _statistics(p: Problem) -> Tensors:
    return block_statistics(p.q, p.k, _dense_exact(p.exact)[1], BLOCK)[:2]  # a count may differ by one at its edge


def _statistics_exact(p: Problem) -> Tensors:
    return block_statistics_reference(p.q, p.k, _dense_exact(p)[1], BLOCK, 1e-3)[:2]


def _reorder(p: Problem) -> Tensors:
    return tuple(reorder_heads(p.q, p.k, **ORDER))  # type: ignore[arg-type]


def _reorder_exact(p: Problem) -> Tensors:
    return tuple(reorder_reference(x, *ORDER.values()) for x in (p.q, p.k))  # type: ignore[arg-type]


def _quantised(p: Problem) -> Tensors:
    return quantised_attention(p.q, p.k, p.v, p.layout, return_lse=True)


def _quantised_exact(p: Problem) -> Tensors:
    layout = p.layout.to("cpu")
    found = quantised_reference(p.q.cpu(), p.k.cpu(), p.v.cpu(), layout, Format())
    return tuple(x.to(p.q.device) for x in found)


def _merge(p: Problem) -> Tensors:
    half = TOKENS // 2
    parts = (_dense(p._replace(k=p.k[:, :, s], v=p.v[:, :, s])) for s in (slice(half), slice(half, None)))
    (o1, lse1), (o2, lse2) = parts
    return merge_states(o1, lse1, o2, lse2)


def _topk(p: Problem) -> Tensors:
    idx, num = row_topk(p.q, 7)
    return idx, num


def _topk_exact(p: Problem) -> Tensors:
    best = p.q.sort(dim=-1, descending=True, stable=True).indices[..., :7].sort(-1).values
    return best, torch.full(best.shape[:-1], 7, device=best.device)
