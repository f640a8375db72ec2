"""What ``patchkit bench`` does: measure attention on this machine, and say what that is worth for a whole run."""

from __future__ import annotations

import dataclasses
import importlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from patchkit.errors import InvalidOption, NothingMatched
from patchkit.recipe_base import Recipe
from patchkit.recipe_files.files import RecipeFile
from patchkit.runs import loading, measure, running
from patchkit.runs.share import Share, measure_share

logger = logging.getLogger(__name__)

Say = Callable[[str], None]
DENSITIES = (0.1, 0.2, 0.3, 0.5)
# AdaSpa's schedule as its paper has it: a fifth of the run is dense, and two steps search.
WARM_UP, SEARCHES = 0.2, 2
SHARES = (0.5, 0.65, 0.8)
_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


@dataclass(frozen=True)
class Request:
    """What to measure. Sizes that are None come from the model, if one is given.

    Args:
        tokens: of the sequence, without text.
        heads: query heads.
        kv_heads: key and value heads; None = as many.
        head_dim: size of a head.
        text: text tokens behind the others, whose blocks are always kept.
        batch: samples.
        causal: language models.
        dtype: ``float16``, ``bfloat16``, ``float32`` or short; None = bfloat16 on a GPU, float32 elsewhere.
        device: None = the accelerator if there is one.
        density: shares of blocks that are kept; empty = a few, or the recipe's own.
        block: tokens of a block; None = 64, or the recipe's own.
        pattern: ``random`` or ``video``.
        steps: of the run that gains are predicted for.
        seconds: how long each entry is timed, about.
    """

    tokens: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    text: int | None = None
    batch: int = 1
    causal: bool = False
    dtype: str | None = None
    device: str | None = None
    density: tuple[float, ...] = ()
    block: int | None = None
    pattern: str = "random"
    steps: int = 50
    seconds: float = 0.5

    def check(self, sizes: bool) -> None:
        """Refuse what cannot be measured; ``sizes``: whether tokens, heads and head size must be given."""
        for name in ("tokens", "heads", "head_dim") if sizes else ():
            if getattr(self, name) is None:
                option = f"--{name.replace('_', '-')}"
                raise InvalidOption(
                    "the shape is not complete", option, f"give {option} N, or a recipe file whose model has a shape"
                )
        for name in ("tokens", "heads", "kv_heads", "head_dim", "block", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidOption(f"{name} is {value}", f"--{name.replace('_', '-')}", "give 1 or more")
        if self.heads and self.kv_heads and self.heads % self.kv_heads:
            raise InvalidOption(
                f"{self.heads} heads over {self.kv_heads}", "--kv-heads", "heads must be a multiple of them"
            )
        for density in self.density:
            if not 0 < density <= 1:
                raise InvalidOption(f"density is {density}", "--density", "give a share above 0, up to 1")
        dtype = _DTYPES.get(self.dtype or "fp32", self.dtype)
        if dtype not in _DTYPES.values():
            raise InvalidOption(f"{self.dtype!r} is no dtype", "--dtype", "give float16, bfloat16 or float32")
        here = loading.devices()
        if self.device is not None and self.device not in here:
            raise InvalidOption(f"the device {self.device!r} is not here", "--device", f"known: {', '.join(here)}")


def attention(request: Request, *, say: Say = logger.info) -> dict[str, Any]:
    """Measure one attention shape; what it is worth is predicted for several attention shares."""
    request.check(sizes=True)
    rows, missing = _measure(request, say)
    expected = [
        {
            "density": row["density"],
            "attention_share": share,
            "speed_up": round(expected_speed_up(share, row, request), 3),
        }
        for row in rows
        for share in SHARES
    ]
    return {
        "attention": rows,
        "missing": missing,
        "steps": request.steps,
        "expected": expected,
        **_circumstances(request),
    }


def expected_speed_up(share: float, row: dict[str, Any], request: Request) -> float:
    """Amdahl's law for AdaSpa's schedule: T / T0 = 1 - a + a / T * (w + searches + (T - w) d / eta).

    a is the attention share, w the dense warm-up steps, eta the retention that was measured, so that d / eta is what a
    sparse call costs; a search costs what was measured as well.
    """
    steps = request.steps
    warm = min(steps, max(1, round(WARM_UP * steps)))
    searches = min(SEARCHES, max(0, steps - warm) + 1) * row["search_over_dense"]
    cost = (warm + searches + (steps - warm) * row["density"] / row["retention"]) / steps
    return 1 / (1 - share + share * cost)


def model(file: RecipeFile, request: Request, *, say: Say = logger.info, bars: bool = True) -> dict[str, Any]:
    """Measure a recipe on its model: attention share and shape, kernels at that shape, the gain expected, the gain.

    Nothing is written. The run is that of the file, patched and unpatched from the same seed.
    """
    request.check(sizes=False)
    job = running.job_of(dataclasses.replace(file, compare=True))
    running.check(job, writes=False)
    assert file.model is not None
    say(f"loading {file.model.id}")
    loaded = loading.load(file.model, quiet=not bars)
    inputs = running.complete_inputs(job, loaded)
    running.check_plan(job, loaded)
    recipe, sites = _sites(loaded, file.recipes)
    say("measuring the attention share of an unpatched run")
    share = measure_share(loaded, inputs, sites, bars=bars)
    if share.call is None:
        raise NothingMatched(
            "no attention op of the recipe's sites was called", file.where("recipes"), "see `patchkit plan`"
        )
    step_name = "num_inference_steps" if loaded.kind == "pipeline" else "max_new_tokens"
    steps = int(inputs.get(step_name) or request.steps)
    filled = _fill(request, share, recipe, loaded.device, steps)
    rows, missing = _measure(filled, say)
    measured = running.carry_out(job, loaded, inputs, say=say, bars=bars)
    return {
        "model": file.model.id,
        "attention": rows,
        "missing": missing,
        "steps": steps,
        "share": _share_row(share, steps),
        "expected": _expected(recipe, share, rows, filled, steps),
        "measured": measured.metrics,
        "notes": measured.notes,
        **_circumstances(filled),
    }


def _sites(loaded: loading.Loaded, recipes: Sequence[Recipe]) -> tuple[Recipe, set[str]]:
    """The recipe whose attention is measured (the first that has a density, else the first) and the sites it takes."""
    import patchkit

    recipe = next((r for r in recipes if hasattr(r, "density")), recipes[0])
    found = patchkit.plan(loaded.target, recipe).to_dict()["recipes"]
    return recipe, set(found[0]["matched"])


def _fill(request: Request, share: Share, recipe: Recipe, device: str, steps: int) -> Request:
    """The request with what the model and the recipe say; what the user said wins."""
    assert share.call is not None
    (batch, heads, tokens, dim), kv_heads = share.call["q"], share.call["k"][1]
    text = share.call["text"] if request.text is None else request.text
    own, block = getattr(recipe, "density", None), getattr(recipe, "block_size", None)
    block = block if isinstance(block, int) else None
    return dataclasses.replace(
        request,
        tokens=request.tokens or tokens - share.call["text"],
        heads=request.heads or heads,
        kv_heads=request.kv_heads or (kv_heads if not request.heads else None),
        head_dim=request.head_dim or dim,
        text=text,
        batch=batch,
        causal=request.causal or bool(share.call["causal"]),
        dtype=request.dtype or share.call["dtype"],
        device=request.device or device,
        density=request.density or ((float(own),) if own is not None else DENSITIES),
        block=request.block or block,
        steps=steps,
    )


def _measure(request: Request, say: Say) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows of the kernels' own benchmark, found as the doctor finds them: this core knows no kernel by name."""
    import torch

    kernels, bench = (importlib.import_module(f"patchkit.kernels{part}") for part in ("", ".bench"))
    device = request.device or loading.default_device()
    dtype = request.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    try:
        shape = bench.Shape(
            "yours",
            tokens=request.tokens,
            heads=request.heads,
            head_dim=request.head_dim,
            kv_heads=request.kv_heads,
            text=request.text or 0,
            batch=request.batch,
            causal=request.causal,
        )
        say(f"measuring attention over {shape.length} tokens on {device}")
        found = bench.Bench(shape, getattr(torch, _DTYPES.get(dtype, dtype)), device, seconds=request.seconds)
        densities = request.density or DENSITIES
        rows = [found.row(request.block or 64, density, request.pattern) for density in densities]
    except kernels.KernelValueError as error:
        raise InvalidOption(str(error), "the shape to measure", "see `patchkit bench --help`") from None
    return rows, found.missing


def _share_row(share: Share, steps: int) -> dict[str, Any]:
    seconds, of_run = share.run(steps)
    return {
        "of_denoiser": round(share.of_denoiser, 4),
        "of_run": round(of_run, 4),
        "other_attention_of_denoiser": round(share.other / share.denoiser, 4) if share.denoiser else 0.0,
        "measured_steps": share.steps,
        "step_seconds": round(share.denoiser / max(1, share.steps), 4),
        "run_seconds": round(seconds, 3),
    }


def _expected(
    recipe: Recipe, share: Share, rows: list[dict[str, Any]], request: Request, steps: int
) -> list[dict[str, Any]]:
    """The gain that the recipe's own cost and the measured retention let expect, for each density."""
    _, of_run = share.run(steps)
    tokens = (request.tokens or 0) + (request.text or 0)
    found = []
    for row in rows:
        cost = _cost(recipe, row, tokens, steps)
        found.append(
            {
                "density": row["density"],
                "attention_share": round(of_run, 4),
                "attention_cost": round(cost, 4),
                "speed_up": round(1 / (1 - of_run + of_run * cost), 3),
            }
        )
    return found


def _cost(recipe: Recipe, row: dict[str, Any], tokens: int, steps: int) -> float:
    """Attention time as a share of dense: the recipe's count of blocks, with the time that a kept block really takes.

    A recipe says its cost at a density, and that is linear in it; so its value where the density is d / retention.
    """
    if not hasattr(recipe, "density"):
        return float(recipe.attention_cost(tokens, steps))
    asked = row["density_asked"]
    low, high = (
        float(dataclasses.replace(recipe, density=d).attention_cost(tokens, steps))  # type: ignore[call-arg]
        for d in (asked / 2, asked)
    )
    slope = (high - low) / (asked / 2)
    return high + slope * (row["density"] / row["retention"] - asked)


def _circumstances(request: Request) -> dict[str, Any]:
    device = request.device or loading.default_device()
    return {"device": measure.device_name(device), "versions": measure.versions()}
