"""One attention shape, measured: dense, sparse at several densities, the search, the error of all of them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from ..dense import dense_attention
from ..errors import value_error
from ..layout import BlockLayout
from ..mass import block_mass
from ..sparse import Path, block_sparse_attention, choose_path
from .accuracy import TOLERANCE, sampled_error
from .patterns import density_of, layout_of, masses
from .rivals import attempt, dense_calls, flex_call
from .shapes import Shape
from .timing import Call, Timing, time_calls

WHERE = "Bench"
MASS_BYTES = 1 << 30  # of block masses at a time


class Bench:
    """Inputs of one shape and what was measured on them. Dense kernels and searches are timed once.

    Args:
        shape: the call.
        dtype: of q, k and v.
        device: where.
        seconds: how long each entry is timed, about.
        flex: whether FlexAttention is measured as well (it is compiled first, which takes its time).
        seed: of the random inputs.

    Raises:
        KernelValueError: no fused dense kernel of torch takes this shape here, so there is nothing to compare with.
    """

    def __init__(
        self,
        shape: Shape,
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        seconds: float = 0.5,
        flex: bool = False,
        seed: int = 0,
    ) -> None:
        self.shape, self.dtype, self.device = shape, dtype, torch.device(device)
        self.seconds, self.flex, self.seed = seconds, flex, seed
        self.limit = TOLERANCE[dtype]
        generator = torch.Generator(self.device).manual_seed(seed)
        heads = (shape.heads, shape.shared_heads, shape.shared_heads)
        self.q, self.k, self.v = (
            torch.randn(shape.batch, h, shape.length, shape.head_dim, dtype=dtype, device=device, generator=generator)
            for h in heads
        )
        self._calls = dense_calls(self.q, self.k, self.v, shape.causal)
        self.dense, self.missing = self._dense()
        if flex:
            # Each shape is compiled anew, and past eight forms of a function torch stops compiling it.
            torch._dynamo.reset()
        self._searches: dict[int, tuple[Timing, int]] = {}

    @property
    def best(self) -> str:
        """The fastest dense kernel."""
        return min(self.dense, key=lambda name: self.dense[name].ms)

    def _dense(self) -> tuple[dict[str, Timing], dict[str, str]]:
        """Timings of the dense kernels that work and are right, and why the others take no part."""
        judge = functools.partial(self._error, layout=None)
        missing = {name: reason for name, call in self._calls.items() if (reason := attempt(call, judge, self.limit))}
        work = {name: call for name, call in self._calls.items() if name not in missing}
        if not work:
            what = "; ".join(f"{name} {reason}" for name, reason in missing.items())
            raise value_error(f"no dense kernel to compare with ({what})", WHERE, "Try another dtype or head size.")
        return time_calls(work, self.device, self.seconds), missing

    def _error(self, out: Tensor, layout: BlockLayout | None) -> float:
        return sampled_error(out, self.q, self.k, self.v, layout, self.shape.causal)

    def search(self, block: int) -> tuple[Timing, int]:
        """Time of the block masses of all heads, and the bytes they take; measured once for each block size.

        A language model's causal calls are searched without the diagonal: twice the work that would be needed.
        """
        if block not in self._searches:
            _, lse = dense_attention(self.q, self.k, self.v, return_lse=True, enable_gqa=True)
            n = -(-self.shape.length // block)
            group = self.shape.heads // self.shape.shared_heads
            step = max(1, MASS_BYTES // (4 * n * n * self.shape.batch) // group) * group

            def work() -> None:
                for h in range(0, self.shape.heads, step):
                    part = slice(h, h + step)
                    k = self.k[:, h // group : -(-(h + step) // group)]
                    block_mass(self.q[:, part], k, lse[:, part], block, block, validate=False)

            timing = time_calls({"mass": work}, self.device, self.seconds)["mass"]
            self._searches[block] = timing, 4 * n * n * self.shape.batch * self.shape.heads
        return self._searches[block]

    def row(self, block: int = 64, density: float = 0.2, pattern: str = "random") -> dict[str, Any]:
        """Everything about one layout, as plain data.

        Args:
            block: tokens of a block.
            density: share of the blocks without text that each row keeps.
            pattern: ``"random"`` or ``"video"``, see ``patterns.masses``.

        Returns:
            ``passed`` says whether the sparse result is right; a row that did not pass is worth nothing else.
        """
        if not 0 < density <= 1:
            raise value_error(f"density is {density}", WHERE, "Use a share above 0, up to 1.")
        shape = self.shape
        mass = masses(shape, block, pattern, self.device, self.seed)
        layout = layout_of(shape, block, mass, density)
        build = functools.partial(layout_of, shape, block, mass, density)
        building = time_calls({"layout": build}, self.device, self.seconds / 4)
        del mass, build
        path = choose_path(layout, shape.head_dim, self.dtype, self.device)
        out, peak = self._once(layout)
        error = self._error(out, layout)
        del out
        row: dict[str, Any] = {
            **_facts(shape, self.dtype),
            "pattern": pattern,
            "block": block,
            "density_asked": density,
            "density": round(density_of(shape, layout), 4),
            "path": path.name,
            "reason": path.reason,
            "pays": path.pays,
            "error": error,
            "passed": error <= self.limit,
            "layout_bytes": layout.nbytes(),
            "peak_bytes": peak,
        }
        return row | self._times(layout, path, building["layout"], self.search(block))

    def _once(self, layout: BlockLayout) -> tuple[Tensor, int | None]:
        """One sparse call, and the memory it takes beyond its inputs (a GPU only)."""
        if self.device.type != "cuda":
            return block_sparse_attention(self.q, self.k, self.v, layout), None
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        out = block_sparse_attention(self.q, self.k, self.v, layout)
        torch.cuda.synchronize(self.device)
        return out, torch.cuda.max_memory_allocated(self.device) - before

    def _times(self, layout: BlockLayout, path: Path, building: Timing, searched: tuple[Timing, int]) -> dict[str, Any]:
        """Sparse, the best dense kernel again and FlexAttention, taking turns: what a clock does hits all of them."""
        flex, reason = self._flex(layout) if self.flex else (None, None)
        work: dict[str, Call] = {
            "sparse": lambda: block_sparse_attention(self.q, self.k, self.v, layout),
            "dense": self._calls[self.best],
        } | ({} if flex is None else {"flex": flex})
        single = _single(layout) if path.name == "triton" else None
        if single is not None:
            work["single"] = lambda: block_sparse_attention(self.q, self.k, self.v, single)
        times = time_calls(work, self.device, self.seconds)
        sparse, dense, density = times["sparse"], times["dense"].ms, density_of(self.shape, layout)
        (mass, mass_bytes), shape = searched, self.shape
        row = {
            "dense": self.best,
            "dense_ms": _short(dense),
            "dense_tflops": _tflops(shape.flops, dense),
            "dense_all_ms": {name: _short(t.ms) for name, t in self.dense.items()} | self.missing,
            "sparse_ms": _short(sparse.ms),
            "sparse_low_ms": _short(sparse.low),
            "sparse_high_ms": _short(sparse.high),
            "calls": sparse.calls,
            "sparse_tflops": _tflops(layout.flops(shape.head_dim, shape.batch, shape.heads), sparse.ms),
            "retention": round(density * dense / sparse.ms, 3),
            "speed_up": round(dense / sparse.ms, 3),
            "mass_ms": _short(mass.ms),
            "mass_bytes": mass_bytes,
            "layout_ms": _short(building.ms),
            "search_over_dense": round((mass.ms + building.ms) / dense, 3),
            "prepare_ms": _short(max(0.0, self._first(layout) - sparse.ms)),
        }
        if path.name == "triton":
            row["form"] = "single" if single is None else "pair"
        if "single" in times:
            row["single_ms"] = _short(times["single"].ms)
        if "flex" in times:
            row |= {"flex_ms": _short(times["flex"].ms), "flex_retention": round(density * dense / times["flex"].ms, 3)}
        return row | ({"flex": reason} if reason else {})

    def _first(self, layout: BlockLayout) -> float:
        """Milliseconds of the first call with a layout, which derives launch orders and schedules from it."""

        def call() -> Tensor:
            return block_sparse_attention(self.q, self.k, self.v, _copy(layout), validate=False)

        return time_calls({"first": call}, self.device, self.seconds / 4)["first"].ms

    def _flex(self, layout: BlockLayout) -> tuple[Call | None, str | None]:
        """FlexAttention on the same blocks, or why it takes no part."""
        try:
            call = flex_call(self.q, self.k, self.v, layout)
        except Exception as problem:  # building its mask may need more memory than there is
            return None, f"not here: {problem}"[:160]
        reason = attempt(call, functools.partial(self._error, layout=layout), self.limit)
        return (call, None) if reason is None else (None, reason)


def _copy(layout: BlockLayout) -> BlockLayout:
    """The same layout with nothing derived from it yet; layouts are told apart by their counts."""
    return dataclasses.replace(layout, kv_num=layout.kv_num.clone())


def _single(layout: BlockLayout) -> BlockLayout | None:
    """The layout kept from running as pairs of rows; None where it does not run so anyway."""
    from ..sparse.triton.pairs import pairs_of

    if pairs_of(layout) is None:
        return None
    single = _copy(layout)
    single.derived("triton.pairs", lambda: None)
    return single


def _facts(shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "shape": shape.name,
        "batch": shape.batch,
        "heads": shape.heads,
        "kv_heads": shape.shared_heads,
        "tokens": shape.tokens,
        "text": shape.text,
        "head_dim": shape.head_dim,
        "causal": shape.causal,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _tflops(flops: int, ms: float) -> float:
    return _short(flops / ms / 1e9)


def _short(value: float) -> float:
    return float(f"{value:.4g}")
