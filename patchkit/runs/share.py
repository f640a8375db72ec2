"""How much of a model's time its attention takes: measured through the same mechanism that recipes use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from patchkit.context import AttentionCall, DenoiseCall
from patchkit.recipe_base import Recipe
from patchkit.runs import calls
from patchkit.runs.loading import Loaded

STEPS = 2


@dataclass(frozen=True, kw_only=True)
class Stopwatch(Recipe):
    """Changes nothing; times every attention op and every call of the denoiser. Not registered: no user asks for it."""

    name: ClassVar[str] = "stopwatch"
    summary: ClassVar[str] = "times attention and denoiser"

    def attend(self, call: AttentionCall, next: Callable[[AttentionCall], Tensor]) -> Tensor:
        q, k = call.q, call.k
        call.ledger.note(
            q=list(q.shape), k=list(k.shape), dtype=str(q.dtype).removeprefix("torch."), causal=call.causal
        )
        call.ledger.note(text=0 if call.text is None else len(call.text), frame=_frame(call))
        with call.ledger.time("op", q.device):
            return next(call)

    def denoise(self, call: DenoiseCall, next: Callable[[DenoiseCall], Any]) -> Any:
        with call.ledger.time("denoiser", next_device(call.module)):
            return next(call)


def _frame(call: AttentionCall) -> int | None:
    grid = call.grid
    return grid.height * grid.width if grid is not None and grid.frames > 1 else None


def next_device(module: Any) -> Any:
    """Where a module computes; weights that wait on the CPU for their turn are timed there as well."""
    import torch

    return next((p.device for p in module.parameters()), torch.device("cpu"))


@dataclass(frozen=True)
class Share:
    """Where the time of an unpatched run goes, over the ``steps`` that were measured.

    Attributes:
        seconds: of the whole call.
        denoiser: of these, in the denoiser (a language model: in its forward).
        attention: of these, in the attention ops of the sites that were asked about.
        other: in all other attention ops.
        steps: denoising steps (forwards of a language model).
        call: the largest attention call of the sites: shapes of q and k, dtype, causal, text, frame.
    """

    seconds: float
    denoiser: float
    attention: float
    other: float
    steps: int
    call: dict[str, Any] | None

    @property
    def of_denoiser(self) -> float:
        """The share of the denoiser's time that these attention ops take."""
        return min(1.0, self.attention / self.denoiser) if self.denoiser > 0 else 0.0

    def run(self, steps: int) -> tuple[float, float]:
        """Seconds of a run of ``steps`` steps, and the share of it that these attention ops take."""
        step = self.denoiser / max(1, self.steps)
        total = max(0.0, self.seconds - self.denoiser) + step * steps
        return total, step * steps * self.of_denoiser / total if total else 0.0


def measure_share(loaded: Loaded, inputs: Mapping[str, Any], sites: set[str] | None, *, bars: bool = False) -> Share:
    """Time a short unpatched run; a shorter one comes first, for caches and compiled kernels.

    Args:
        loaded: the model.
        inputs: of the call.
        sites: full names of the sites that count as attention; None = all self- and joint attention.
        bars: whether progress bars may be shown.
    """
    import patchkit

    steps = "num_inference_steps" if loaded.kind == "pipeline" else "max_new_tokens"
    count = min(STEPS, int(inputs.get(steps) or STEPS))
    with patchkit.apply(loaded.target, Stopwatch()) as patch:
        calls.call(loaded, {**inputs, steps: 1}, label="warm-up", bars=bars)
        made = calls.call(loaded, {**inputs, steps: count}, label="attention share", bars=bars)
        (account,) = patch.report().to_dict()["recipes"]
    ops = [row for row in account["rows"] if "op" in row["seconds"]]
    mine = [row for row in ops if _counts(row, sites)]
    largest = max(
        mine, key=lambda row: row["values"]["q"][1] * row["values"]["q"][2] * row["values"]["k"][2], default=None
    )
    return Share(
        seconds=made.seconds,
        denoiser=sum(row["seconds"].get("denoiser", 0.0) for row in account["rows"]),
        attention=sum(row["seconds"]["op"] for row in mine),
        other=sum(row["seconds"]["op"] for row in ops if row not in mine),
        steps=count,
        call=None if largest is None else largest["values"],
    )


def _counts(row: Mapping[str, Any], sites: set[str] | None) -> bool:
    if sites is None:
        return row.get("kind") in ("self", "joint")
    return f"{row['component']}.{row['site']}" in sites or row["site"] in sites
