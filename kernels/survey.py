"""Which implementation each operator takes on a device and why, whether it runs, and how far off its result is."""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .bench.accuracy import TOLERANCE
from .deadband import dead_band
from .deadband.reference import dead_band_reference
from .dense import dense_attention
from .dense.reference import dense_attention_reference
from .gpu import obstacle
from .layout import BlockLayout
from .mass import block_mass
from .mass.reference import block_mass_reference
from .merge import merge_states
from .packed import packed_attention
from .packed.reference import packed_attention_reference
from .quantised import Format, quantised_attention
from .quantised.reference import quantised_reference
from .reorder import reorder_heads
from .reorder.reference import reorder_reference
from .runs import Packed, find_runs, pack_runs
from .sparse import block_sparse_attention, choose_path
from .sparse.reference import block_sparse_reference
from .statistics import block_statistics
from .statistics.reference import block_statistics_reference

# Small and awkward: ragged last blocks, two query heads on one KV head, a text-like complete row.
TOKENS, HEADS, D, BLOCK = 300, 2, 64, 64
# A layout as long as those that the kernels are for, to ask for the path; nothing is computed with it.
LONG = 32_768
# Gradients go through one more product of rounded numbers.
BACKWARD = 4.0

Tensors = tuple[Tensor, ...]


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


class Problem(NamedTuple):
    """The small problem that every operator solves, in one dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    layout: BlockLayout

    @property
    def exact(self) -> Problem:
        """The same inputs in fp32."""
        return Problem(self.q.float(), self.k.float(), self.v.float(), self.layout)


Solve = Callable[[Problem], Tensors]
Operator = tuple[Callable[[torch.device], tuple[str, str]], tuple[torch.dtype, ...], Solve, Solve]


def survey(device: torch.device | str = "cpu") -> list[Finding]:
    """Run every operator on ``device`` once in fp32, fp16 and bf16, and compare it with its fp32 reference."""
    device = torch.device(device)
    with contextlib.suppress(Exception):  # torch's own first-time costs are no operator's; what fails is found below
        _dense(_problem(torch.float32, device))
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
        "block_mass": (_path_of("mass.triton"), every, _mass, _mass_exact),
        "block_statistics": (_path_of("statistics.triton"), every, _statistics, _statistics_exact),
        "reorder_heads": (_path_of("reorder.triton"), every, _reorder, _reorder_exact),
        "quantised_attention": (_path_of("quantised.triton.launch"), every, _quantised, _quantised_exact),
        "merge_states": (lambda device: ("plain torch", "elementwise on any device"), every, _merge, _dense_exact),
    }
    found["dead_band"] = (_path_of("deadband.triton"), every, _dead_band, _dead_band_exact)
    found["packed_attention"] = (_path_of("packed.triton"), every, _packed, _packed_exact)
    if importlib.util.find_spec("patchkit.kernels.topk"):
        found["row_topk"] = (_path_of("topk.triton"), (torch.float32,), _topk, _topk_exact)
    return found


def _check(name: str, dtype: torch.dtype, device: torch.device) -> Check:
    """Solve the small problem twice. Whatever the operator raises is a finding: that is what this is for."""
    _, _, solve, reference = _operators()[name]
    problem = _problem(dtype, device)
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


def _problem(dtype: torch.dtype, device: torch.device) -> Problem:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, HEADS, TOKENS, D), (1, 1, TOKENS, D), (1, 1, TOKENS, D))
    q, k, v = (torch.randn(s, generator=generator).to(device, dtype) for s in shapes)
    n = -(-TOKENS // BLOCK)
    kept = torch.rand(1, HEADS, n, n, generator=generator) < 0.4
    kept[..., -1, :] = True
    layout = BlockLayout.from_bool(kept, block_q=BLOCK, block_k=BLOCK, q_len=TOKENS, kv_len=TOKENS)
    return Problem(q, k, v, layout.to(device))


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
    return _path_of("sparse.triton.backward_launch")(device)


def _path_of(module: str) -> Callable[[torch.device], tuple[str, str]]:
    """The Triton kernel where there is one and nothing is in its way, else plain torch in blocks."""

    def path(device: torch.device) -> tuple[str, str]:
        missing = obstacle(device)
        if missing is None and importlib.util.find_spec(f"patchkit.kernels.{module}") is None:
            missing = "no Triton kernel for it yet"
        return ("triton", "Triton kernel") if missing is None else ("blocked", missing)

    return path


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
    from .topk import row_topk

    idx, num = row_topk(p.q, 7)
    return idx, num


def _topk_exact(p: Problem) -> Tensors:
    best = p.q.sort(dim=-1, descending=True, stable=True).indices[..., :7].sort(-1).values
    return best, torch.full(best.shape[:-1], 7, device=best.device)


def _dead_band(p: Problem) -> Tensors:
    return (dead_band(p.k, 0.5)[0],)


def _dead_band_exact(p: Problem) -> Tensors:
    return (dead_band_reference(p.k.cpu(), 0.5)[0].cumsum(2).to(p.k.device),)


def _packed(p: Problem) -> Tensors:
    packed, used, starts = _past(p)
    return (packed_attention(p.q, packed, used, p.k, p.v, starts, chunk=64, first=192),)


def _packed_exact(p: Problem) -> Tensors:
    packed, used, starts = _past(Problem(p.q.cpu(), p.k.cpu(), p.v.cpu(), p.layout))
    q, k, v = p.q.cpu(), p.k.cpu(), p.v.cpu()
    return (packed_attention_reference(q, packed, used, k, v, starts, chunk=64, first=192).to(p.q.device),)


def _past(p: Problem) -> tuple[Packed, Tensor, list[int]]:
    """A past of 192 tokens in runs of two, before the tokens of the problem."""
    begins = find_runs(p.k.repeat_interleave(2, 2)[:, :, :192], 0.0, chunk=64)
    packed = pack_runs(p.k.repeat_interleave(2, 2)[:, :, :192], p.v[:, :, :192], begins)
    return packed, begins.sum(-1, dtype=torch.int32).expand(5, -1, -1).contiguous(), [192] * 5
