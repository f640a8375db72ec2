"""`patchkit calibrate deltallm FILE`: thresholds for the model that a recipe file names."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from patchkit.errors import InvalidOption
from patchkit.jobs import Job, JobCall, JobProgress, JobResult
from patchkit.recipe_files.files import save_recipes
from patchkit.recipes.deltallm import DeltaLLM
from patchkit.recipes.deltallm.calibration import calibrate
from patchkit.text import table

Text = Annotated[str, Field(min_length=1)]


class Options(BaseModel):
    """The section ``calibrate: {deltallm: {...}}`` of a recipe file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    target_sparsity: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.5, description="share of rows that each layer is to remove (runs), or the paper's count (elements)"
    )
    texts: Annotated[list[Text], Field(min_length=1)] | None = Field(
        default=None, description="texts of the kind that the model will read; the story that ships with patchkit"
    )
    file: str | None = Field(default=None, description="a text file, in place of texts")
    max_tokens: Annotated[int, Field(ge=2)] = Field(default=2048, description="of each text")


def check(call: JobCall) -> None:
    """Refuse wrong recipes, texts and outputs before the model is loaded."""
    _recipe(call)
    _texts(call)


def run(call: JobCall) -> JobResult:
    """Calibrate, and write a recipe file."""
    options: Options = call.options
    recipe = _recipe(call)
    assert call.output is not None
    texts = _texts(call)
    setting = {name: value for name, value in recipe.options().items() if name != "theta"}
    call.say(f"reading {len(texts)} text{'s' if len(texts) > 1 else ''} with the unpatched model")

    def tell(done: int, total: int) -> None:
        call.progress(JobProgress(done, total, "layers"))

    found = calibrate(
        call.target,
        texts,
        options.target_sparsity,
        tokenizer=call.tokenizer,
        max_tokens=options.max_tokens,
        progress=tell,
        **setting,
    )
    call.output.parent.mkdir(parents=True, exist_ok=True)
    written = save_recipes([dataclasses.replace(recipe, theta=found["theta"])], call.output)
    rows = [(str(i), f"{theta:g}") for i, theta in enumerate(found["theta"]) if theta]
    notes = (f"use them: patchkit.apply(model, {str(written)!r}), or add `model:` and `inputs:` and run the file",)
    return JobResult({"recipe": written}, {"options": found}, table(("layer", "theta"), rows, indent=""), notes)


def _recipe(call: JobCall) -> DeltaLLM:
    (recipe, *others) = call.recipes
    if others or not isinstance(recipe, DeltaLLM):
        raise InvalidOption(
            "a calibration takes the recipe deltallm alone", "field 'recipes'", "write `recipes: [deltallm: {...}]`"
        )
    if call.output is None or call.output.suffix not in (".yaml", ".yml"):
        raise InvalidOption(
            "the thresholds go into a recipe file",
            "field 'output'",
            "add `output: out/deltallm.yaml`, or give --output",
        )
    return recipe


def _texts(call: JobCall) -> list[str]:
    options: Any = call.options
    if options.file is not None:
        if options.texts is not None:
            raise InvalidOption("both texts and file", call.where("file"), "give one of them")
        try:
            return [Path(options.file).expanduser().read_text(encoding="utf-8")]
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidOption(
                f"cannot read {options.file}: {error}", call.where("file"), "name a text file in UTF-8"
            ) from None
    if options.texts is not None:
        return list(options.texts)
    from patchkit import zoo

    return [zoo.prose()]


JOB = Job(
    "Find a threshold for each layer of a language model, and write them as a recipe file.\n\n"
    "The unpatched model reads some text once; bisection over the keys that it makes then finds the thresholds at "
    "which each layer reaches the same sparsity. (DeltaLLM, arXiv 2507.19608.)",
    Options,
    run,
    check,
)
