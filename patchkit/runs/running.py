"""What ``patchkit run`` and ``patchkit compare`` do: check everything, load, call, measure, write."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchkit.errors import Conflict, InvalidOption
from patchkit.recipe_base import Recipe
from patchkit.recipe_files.files import RecipeFile
from patchkit.runs import calls, loading, measure, outputs
from patchkit.runs.calls import Produced
from patchkit.runs.loading import Loaded
from patchkit.runs.writing import write

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

WARM_UP_STEPS = 2
Say = Callable[[str], None]


@dataclass(frozen=True)
class Variant:
    """One way to call the model: with these recipes, or with none."""

    label: str
    recipes: tuple[Recipe, ...] = ()


@dataclass(frozen=True)
class RunResult:
    """What a run wrote and measured.

    Attributes:
        files: label -> file; of several results the first.
        metrics: what ``metrics.json`` says (it is written in comparisons only).
        report: the patch's own account in words, by variant.
        notes: what the reader should know: files that were replaced, figures that are missing,
            cautions from the reports.
    """

    files: dict[str, Path]
    metrics: dict[str, Any]
    report: dict[str, str]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "files": {label: str(path) for label, path in self.files.items()},
            "metrics": self.metrics,
            "notes": self.notes,
        }


@dataclass(frozen=True)
class Job:
    """A checked request. The first variant is the reference that others are measured against."""

    file: RecipeFile
    variants: tuple[Variant, ...]
    primary: str | None = None  # the variant whose result bears the name that the user gave
    notes: list[str] = field(default_factory=list)

    @property
    def extra(self) -> set[str]:
        """Arguments that recipes take for themselves."""
        return {name for v in self.variants for r in v.recipes for name in r.arguments}

    def inputs_for(self, variant: Variant, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs without those that only another variant's recipes take."""
        mine = {name for r in variant.recipes for name in r.arguments}
        return {n: v for n, v in inputs.items() if n not in self.extra - mine}


def job_of(file: RecipeFile) -> Job:
    """The job of ``patchkit run``."""
    patched = Variant("patched", file.recipes)
    return Job(file, (Variant("dense"), patched) if file.compare else (patched,), primary="patched")


def comparison(first: RecipeFile | None, second: RecipeFile | None, labels: tuple[str, str]) -> Job:
    """The job of ``patchkit compare A B``; None stands for dense. Model, inputs and output are the first file's."""
    base = first or second
    if base is None:
        raise InvalidOption("dense against dense shows nothing", "compare", "name a recipe or a recipe file")
    notes = []
    if first and second:
        for name in ("model", "inputs"):
            if getattr(first, name) != getattr(second, name):
                notes.append(f"{name} of {labels[0]} is used for both; that of {labels[1]} differs and is not used")
    names = labels if labels[0] != labels[1] else (f"{labels[0]}-a", f"{labels[1]}-b")
    variants = [Variant(n, f.recipes if f else ()) for n, f in zip(names, (first, second), strict=True)]
    return Job(base, tuple(variants), notes=notes)


def check(job: Job, *, writes: bool = True) -> None:
    """Everything that can be known before the model is loaded. Writes nothing; ``writes``: whether the job will."""
    file = job.file
    file.require(output=writes)
    assert file.model is not None
    if file.output is not None and writes:
        outputs.check_writable(file.output, file.where("output"))
    loading.check(file.model, file.where("model"))
    for name, paths in calls.media_paths(file.inputs, job.extra).items():
        for path in paths:
            if not path.is_file():
                raise InvalidOption(f"there is no file {path}", file.where("inputs", name), "check the path")
    cls = loading.pipeline_class(file.model)
    if cls is not None:
        _check_call(job, cls, writes)


def _check_call(job: Job, cls: type, writes: bool = True) -> None:
    file = job.file
    extra = {*job.extra, *calls.OWN_INPUTS}
    loading.check_inputs(cls, dict(file.inputs), extra, lambda name: file.where("inputs", name))
    if file.output is not None and writes:
        outputs.check_kind(file.output, calls.kind_of(cls), file.where("output"))


def run(job: Job, *, say: Say = logger.info, bars: bool = True) -> RunResult:
    """Carry out a job.

    Args:
        job: from :func:`job_of` or :func:`comparison`.
        say: is told what is being done, one line each.
        bars: whether progress bars may be shown on a terminal.

    Raises:
        PatchkitError: something is wrong with the request (before any compute), or the pipeline failed. The model is
            unpatched and no file has been written then.
    """
    check(job)
    assert job.file.model is not None
    say(f"loading {job.file.model.id}")
    loaded = loading.load(job.file.model, quiet=not bars)
    if loaded.kind == "pipeline":
        _check_call(job, type(loaded.target))
    else:
        outputs.check_kind(job.file.output, "text", job.file.where("output"))  # type: ignore[arg-type]
    inputs = complete_inputs(job, loaded)
    check_plan(job, loaded)
    measured = carry_out(job, loaded, inputs, say=say, bars=bars)
    files = write(job, measured, inputs)
    return RunResult(files, measured.metrics, measured.texts, measured.notes)


def complete_inputs(job: Job, loaded: Loaded) -> dict[str, Any]:
    """The inputs of the file over those that the model is best called with, pictures and videos read in."""
    inputs = {"seed": 0, **(loaded.defaults or {}), **job.file.inputs}
    return calls.load_media(inputs, job.extra) if calls.media_paths(inputs, job.extra) else inputs


@dataclass(frozen=True)
class Measured:
    """What the variants of a job made, before anything is written; ``texts`` are the reports in words."""

    produced: dict[str, Produced]
    metrics: dict[str, Any]
    texts: dict[str, str]
    notes: list[str]
    pictures: dict[str, Image] = field(default_factory=dict)  # "variant.recipe, title" -> what the recipe draws


def carry_out(job: Job, loaded: Loaded, inputs: Mapping[str, Any], *, say: Say, bars: bool) -> Measured:
    """Call every variant with the same inputs and compare what they make; after a warm-up if there are several."""
    notes = list(job.notes)
    warm = warm_up(job, loaded, inputs, say, bars, notes) if len(job.variants) > 1 else None
    produced, reports, texts = {}, {}, {}
    pictures: dict[str, Image] = {}
    for variant in job.variants:
        say(
            f"running {variant.label}" + (f" ({', '.join(r.name for r in variant.recipes)})" if variant.recipes else "")
        )
        with patched(loaded, variant) as patch:
            arguments = job.inputs_for(variant, inputs)
            produced[variant.label] = calls.call(loaded, arguments, label=variant.label, bars=bars)
            if patch is not None:
                report = patch.report()
                reports[variant.label], texts[variant.label] = report.to_dict(), str(report)
                pictures |= {f"{variant.label}.{title}": picture for title, picture in report.pictures().items()}
                notes += [f"{variant.label}, {caution}" for caution in report.cautions()]
    metrics = _metrics(job, loaded, inputs, produced, reports)
    if warm is not None:
        metrics["warm_up"] = warm
    return Measured(produced, metrics, texts, notes, pictures)


def plan(file: RecipeFile, *, say: Say = logger.info, bars: bool = True) -> Any:
    """Load the model of a recipe file and plan its recipes on it. Computes nothing."""
    import patchkit

    if file.model is None:
        file.require(prompt=False, output=False)
    assert file.model is not None
    loading.check(file.model, file.where("model"))
    say(f"loading {file.model.id}")
    loaded = loading.load(file.model, quiet=not bars)
    steps = {**(loaded.defaults or {}), **file.inputs}.get("num_inference_steps", 50)
    return patchkit.plan(loaded.target, list(file.recipes), steps=steps)


def check_plan(job: Job, loaded: Loaded) -> None:
    """Refuse what cannot be applied before the first second of compute."""
    import patchkit

    for variant in job.variants:
        if not variant.recipes:
            continue
        found = patchkit.plan(loaded.target, list(variant.recipes))
        if found.problems:
            raise Conflict(
                "; ".join(found.problems), job.file.where("recipes"), "leave one of them out, or see `patchkit plan`"
            )


@contextlib.contextmanager
def patched(loaded: Loaded, variant: Variant) -> Iterator[Any]:
    """The model with a variant's recipes on it for a while; gives the patch, None where there are no recipes."""
    if not variant.recipes:
        yield None
        return
    import patchkit

    with patchkit.apply(loaded.target, list(variant.recipes)) as patch:
        yield patch


def warm_up(
    job: Job, loaded: Loaded, inputs: Mapping[str, Any], say: Say, bars: bool, notes: list[str]
) -> dict[str, Any]:
    """Call each variant shortly, so that none pays for first-time costs (caches, compiled kernels) when timed."""
    steps = min(WARM_UP_STEPS, int(inputs.get("num_inference_steps") or WARM_UP_STEPS))
    short = dict(inputs, num_inference_steps=steps) if loaded.kind == "pipeline" else dict(inputs, max_new_tokens=steps)
    seconds = {}
    say(f"warming up ({steps} steps each)")
    for variant in job.variants:
        arguments = job.inputs_for(variant, short)
        try:
            with _silent(), patched(loaded, variant):
                seconds[variant.label] = round(calls.call(loaded, arguments, label="warm-up", bars=bars).seconds, 4)
        except InvalidOption as error:  # a recipe may need more steps than these
            notes.append(f"{variant.label} was timed without a warm-up: {error.what}")
    return {"steps": steps, "seconds": seconds}


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep recipes from warning about the few steps of a warm-up."""
    ours = logging.getLogger("patchkit")
    level = ours.level
    ours.setLevel(logging.ERROR)
    try:
        yield
    finally:
        ours.setLevel(level)


def _metrics(
    job: Job,
    loaded: Loaded,
    inputs: Mapping[str, Any],
    produced: Mapping[str, Produced],
    reports: Mapping[str, dict[str, Any]],
) -> dict[str, Any]:
    assert job.file.model is not None
    zoo = job.file.model.zoo is not None
    reference = job.variants[0].label
    metrics: dict[str, Any] = {
        "model": job.file.model.id,
        "pipeline": type(loaded.target).__name__,
        "prompt": inputs.get("prompt"),
        "seed": inputs.get("seed", 0),
        "steps": inputs.get("num_inference_steps"),
        "shape": measure.shape(produced[reference]),
        "variants": {},
        **measure.circumstances(loaded),
    }
    for variant in job.variants:
        made = produced[variant.label]
        row: dict[str, Any] = {"seconds": round(made.seconds, 4), "peak_memory_bytes": made.memory}
        row["detector"] = measure.detect(made, zoo, inputs.get("prompt"))
        row["recipes"] = [{"name": r.name, "options": r.options(defaults=True)} for r in variant.recipes]
        if variant.label in reports:
            row["density"] = measure.densities(reports[variant.label])
            row["report"] = reports[variant.label]
        if variant.label != reference:
            row["against"] = reference
            row |= measure.distances(produced[reference], made)
            row["speed_up"] = round(produced[reference].seconds / made.seconds, 4) if made.seconds else None
        metrics["variants"][variant.label] = row
    return metrics
