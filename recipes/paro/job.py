"""`patchkit calibrate paro FILE`: the plan that a recipe file asks for."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from patchkit.errors import InvalidOption
from patchkit.jobs import Job, JobCall, JobProgress, JobResult
from patchkit.kernels.reorder import NAMES
from patchkit.recipes.paro import Paro
from patchkit.recipes.paro.calibration import Progress, calibrate
from patchkit.recipes.paro.plan import PermutePlan
from patchkit.text import table

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]


class Options(BaseModel):
    """The section ``calibrate: {paro: ...}`` of a recipe file. The plan goes where the recipe ``paro`` looks for it."""

    model_config = ConfigDict(extra="forbid")

    prompts: Annotated[list[Text], Field(min_length=1)] | None = Field(
        default=None, description="texts; one or two do. The prompt of the inputs if left out"
    )
    density: Annotated[float, Field(gt=0, le=1)] = Field(default=0.3, description="share of image blocks that is kept")
    buckets: Count = Field(default=10, description="parts of the run with masks of their own")
    share_from: Share = Field(default=0.5, description="share of the run from which on one mask serves all")
    select: Literal["score", "kept_mass"] = Field(default="score", description="how orders are compared")
    alpha: Share = Field(default=0.5, description="1 for sparse plans, 0 for plans that are only quantised")
    scope: Literal["head", "layer", "timestep", "global"] = Field(
        default="layer", description="over which blocks one threshold is found"
    )
    eps: float | Literal["rel"] = Field(default=1e-3, description="probability that counts as small, or rel")
    sigma: Share = Field(default=0.9, description="share of small entries that makes a block skippable")
    block_size: Count = Field(default=64, description="tokens of a block")
    order_steps: Count = Field(default=4, description="steps at which orders are compared")
    query_stride: Count = Field(default=1, description="compare orders on every such query block; 4 for long videos")
    folder: str | None = Field(default=None, description="where figures are kept; beside the plan if left out")


def check(call: JobCall) -> None:
    """Refuse a missing recipe, plan or prompt before the model is loaded."""
    _recipe(call)
    if call.options.prompts is None:
        _prompts(call)


def _clear(folder: Path) -> None:
    """Remove what a calibration wrote; whatever else somebody keeps in the folder stays, and then the folder, too."""
    for pattern in ("orders-*.safetensors", "mass-*", "seen-*.json", "calibration.json"):
        for path in folder.glob(pattern):
            path.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def run(call: JobCall) -> JobResult:
    """Calibrate, and write the plan. Stopped, it goes on with the prompts that are missing."""
    options: Options = call.options
    recipe, path = _recipe(call)
    prompts = options.prompts or _prompts(call)
    folder = Path(options.folder) if options.folder else path.with_suffix(".calibration")
    inputs = {n: v for n, v in call.inputs.items() if n not in ("prompt", "seed", "fps")}
    choices = options.model_dump(exclude={"prompts", "folder"})
    call.say(f"calibrating on {len(prompts)} prompts; {folder} keeps what is finished")
    plan = calibrate(
        call.target,
        prompts,
        seed=int(call.inputs.get("seed") or 0),
        layers=recipe.layers,
        exclude=recipe.exclude,
        folder=folder,
        progress=_progress(call),
        **choices,
        **inputs,
    )
    plan.save(path)
    if options.folder is None:
        _clear(folder)  # gigabytes, for a long video
    return JobResult({"plan": path}, _data(plan), _text(plan), _notes(plan))


def _recipe(call: JobCall) -> tuple[Paro, Path]:
    """The recipe paro of the file, and where it wants its plan."""
    found = [r for r in call.recipes if isinstance(r, Paro)]
    if len(found) != 1 or not isinstance(found[0].plan, str):
        raise InvalidOption(
            "the recipe paro has to say where its plan goes",
            "field 'recipes'",
            "write `recipes: [paro: {plan: out/plan.safetensors}]`",
        )
    return found[0], Path(found[0].plan)


def _prompts(call: JobCall) -> list[str]:
    given = call.inputs.get("prompt")
    prompts = [given] if isinstance(given, str) else list(given or [])
    if not prompts:
        raise InvalidOption("there is no prompt", call.where("prompts"), "write `prompts: [...]`, one or two")
    return prompts


def _progress(call: JobCall) -> Progress:
    begun = time.monotonic()

    def tell(done: int, total: int, what: str) -> None:
        left = (time.monotonic() - begun) / done * (total - done)
        call.progress(JobProgress(done, total, what, left))

    return tell


def _data(plan: PermutePlan) -> dict[str, object]:
    return {
        "sites": list(plan.facts.sites),
        "order": plan.order.tolist(),
        "density": float(plan.density.mean()),
        "kept_mass": float(plan.kept_mass.mean()),
        "kept_mass_by_head": plan.kept_mass.mean(0).tolist(),
    }


def _text(plan: PermutePlan) -> str:
    """A row a site: how many heads have which order, the density and the mass that is kept."""
    rows = []
    for row, counts in enumerate(plan.histogram().tolist()):
        mass = plan.kept_mass[:, row]
        name = plan.facts.sites[row] if plan.facts.sites else str(row)
        figures = (f"{float(plan.density[:, row].mean()):.3f}", f"{float(mass.mean()):.3f}", f"{float(mass.min()):.3f}")
        rows.append((name, *map(str, counts), *figures))
    return table(("site", *NAMES, "density", "kept mass", "worst head"), rows, indent="")


def _notes(plan: PermutePlan) -> tuple[str, ...]:
    low = int((plan.kept_mass.mean(0) < 0.9).sum())
    notes = [f"it serves {plan.facts.steps} steps of a grid {plan.facts.grid} only"]
    if low:
        total = plan.order.numel()
        notes.append(
            f"{low} of {total} heads keep less than 0.9 of their mass: raise the density, or run these heads "
            "dense with `dense_below: 0.9`"
        )
    return tuple(notes)


JOB = Job(
    "Make the plan of the recipe paro: which order of tokens each head has, and which blocks it computes.\n\n"
    "Each prompt is generated twice, dense. Stopped, the same command goes on with the prompts that are missing. "
    "(PAROAttention, arXiv 2506.16054.)",
    Options,
    run,
    check,
)
