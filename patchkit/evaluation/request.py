"""A comparison that was asked for, checked as far as it can be before a model is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from patchkit.errors import InvalidOption
from patchkit.evaluation import store
from patchkit.evaluation.cases import APART, Case, choose
from patchkit.recipe_files.fields import Output
from patchkit.recipe_files.files import RecipeFile
from patchkit.runs import calls, outputs, running
from patchkit.runs.running import Job, Variant
from patchkit.zoo import worlds
from patchkit.zoo.worlds import World

DENSE = "dense"


@dataclass(frozen=True)
class Request:
    """What is compared.

    Attributes:
        job: model, inputs and variants; the first variant is the unpatched model.
        cases: the prompts.
        seeds: samples a prompt.
        output: the folder that everything goes to.
        world: whose detectors read the results, if the model has one.
        clip: folder or hub id of a CLIP model that scores the results.
        dino: of a vision model likewise.
        notes: what the reader should know.
    """

    job: Job
    cases: tuple[Case, ...]
    seeds: int
    output: Path
    world: World | None = None
    clip: str | None = None
    dino: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The unpatched model first."""
        return self.job.variants

    def inputs(self, variant: Variant, case: Case, inputs: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """The inputs of one sample."""
        merged = {**inputs, **case.inputs, "prompt": case.prompt, "seed": seed}
        return self.job.inputs_for(variant, merged)


def make(
    sources: Sequence[tuple[str, RecipeFile | None]],
    *,
    prompts: str | None = None,
    seeds: int = 1,
    clip: str | None = None,
    dino: str | None = None,
) -> Request:
    """A checked request.

    Args:
        sources: (label, recipe file) of each variant; None stands for the unpatched model, which is always among them.
            Model, inputs and output are those of the first file.
        prompts: a number, a file, or None for the prompt of the recipe file.
        seeds: samples a prompt.
        clip: see :class:`Request`.
        dino: see :class:`Request`.

    Raises:
        PatchkitError: something is wrong. Nothing has been loaded, computed or written then.
    """
    files = [(label, file) for label, file in sources if file is not None]
    if not files:
        raise InvalidOption("dense against dense shows nothing", "compare", "name a recipe or a recipe file")
    if not 1 <= seeds <= APART:
        raise InvalidOption(f"{seeds} seeds were asked for", "--seeds", f"give 1 to {APART}")
    base = files[0][1]
    if base.model is None:
        base.require(prompt=False, output=False)
    assert base.model is not None
    world = worlds.of(base.model.zoo) if base.model.zoo is not None else None
    cases = choose(prompts, base, world)
    labels = _labels([label for label, _ in files])
    variants = [Variant(label, file.recipes) for label, (_, file) in zip(labels, files, strict=True)]
    notes = [
        f"{name} of {labels[0]} is used for all; that of {label} differs and is not used"
        for label, (_, file) in zip(labels[1:], files[1:], strict=True)
        for name in ("model", "inputs")
        if getattr(file, name) and getattr(file, name) != getattr(base, name)
    ]
    shared = dataclasses.replace(base, inputs={n: v for n, v in base.inputs.items() if n != "prompt"})
    job = Job(shared, (Variant(DENSE), *variants))
    folder = _folder(base.output, base)
    request = Request(job, tuple(cases), seeds, folder, world, clip, dino, notes)
    _check(request)
    return request


def _labels(names: Sequence[str]) -> list[str]:
    """Every variant has a name of its own, and only the unpatched model is called dense."""
    out: list[str] = []
    for name in names:
        label, number = name, 1
        while label in out or label == DENSE:
            number += 1
            label = f"{name}-{number}"
        out.append(label)
    return out


def _folder(output: Output | None, file: RecipeFile) -> Path:
    if output is None:
        raise InvalidOption("no output is named", file.where("output"), "give --output FOLDER/")
    if not output.folder:
        raise InvalidOption(
            f"{output.path} is one file, and a comparison over prompts and seeds writes several",
            file.where("output"),
            "end the output with / for a folder",
        )
    return output.path


def _check(request: Request) -> None:
    """What :func:`patchkit.runs.running.check` asks of a run, for every prompt, and the folder."""
    file = request.job.file
    outputs.check_writable(Output(request.output, folder=True), file.where("output"))
    store.check_folder(request.output, file.where("output"))
    distinct = {tuple(sorted(case.inputs)): case for case in request.cases}  # one check for each set of names
    for case in request.cases:
        for name, paths in calls.media_paths(case.inputs, request.job.extra).items():
            for path in paths if isinstance(paths, list) else [paths]:
                if not path.is_file():
                    raise InvalidOption(f"there is no file {path}", f"input {name!r} of a prompt", "check the path")
    for case in distinct.values():
        inputs = {**file.inputs, **case.inputs, "prompt": case.prompt}
        running.check(dataclasses.replace(request.job, file=dataclasses.replace(file, inputs=inputs)), writes=False)
