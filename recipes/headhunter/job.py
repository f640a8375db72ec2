"""`patchkit headhunt FILE`: a hunt that a recipe file describes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from patchkit.errors import InvalidOption
from patchkit.jobs import Job, JobCall, JobProgress, JobResult
from patchkit.recipes.headhunter import hunt
from patchkit.recipes.headhunter.objectives import build
from patchkit.recipes.headhunter.search import Hunt, Progress
from patchkit.recipes.headhunter.softpag import SoftPAG
from patchkit.recipes.headhunter.store import text_of
from patchkit.text import table

Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]


class Options(BaseModel):
    """The section ``headhunt`` of a recipe file. Strength, scale, scope and target are those of its recipe softpag."""

    model_config = ConfigDict(extra="forbid", strict=True)

    objective: Any = Field(
        default="shape-world",
        description="what is maximised: shape-world, {clip: ID}, {pickscore: ID}, {aesthetic: ID}, "
        "{harmonic: [...]}, {thresholding: {by: ..., floors: [[..., NUMBER]]}}, or module:function",
    )
    prompts: Annotated[list[Text], Field(min_length=1)] | Count | None = Field(
        default=None, description="texts, or how many of a zoo model's fixed set; the prompt of the inputs if left out"
    )
    seeds: list[int] | None = Field(default=None, description="one for each prompt; 0, 1, 2 ... if left out")
    top_k: Count = Field(default=3, description="heads that a round adds")
    rounds: Count = Field(default=5, description="how often")
    layers: str | int | list[int] | None = Field(default=None, description="layers that the heads come from")
    batch: Count = Field(default=4, description="candidates that share a forward")
    store: str | None = Field(default=None, description="file of the scores; beside the output if left out")
    name: str | None = Field(default=None, description="save the heads as a preset of this name, too")
    about: str = Field(default="", description="what the heads are good for, in words")


def check(call: JobCall) -> None:
    """Refuse wrong recipes, prompts and outputs before the model is loaded."""
    _recipe(call)
    _output(call)
    if call.options.prompts is not None:
        _prompts(call)


def run(call: JobCall) -> JobResult:
    """Hunt, and write the preset."""
    options: Options = call.options
    recipe = _recipe(call)
    output = _output(call)
    prompts = _prompts(call)
    store = Path(options.store) if options.store else output.with_suffix(".hunt.json")
    inputs = {n: v for n, v in call.inputs.items() if n not in ("prompt", "seed", "fps")}

    def tell(progress: Progress) -> None:
        what = f"round {progress.round} of {progress.rounds}"
        call.progress(JobProgress(progress.done, progress.total, what, progress.left))

    call.say(f"hunting on {len(prompts)} prompts; {store} keeps what is finished")
    found = hunt(
        call.target,
        build(options.objective, call.where("objective"), call.device),
        prompts,
        options.seeds,
        options.top_k,
        options.rounds,
        recipe.scale,
        recipe.strength,
        options.layers,
        store,
        scope=recipe.scope,
        target=recipe.target,
        batch=options.batch,
        progress=tell,
        **inputs,
    )
    written = {"preset": found.save_preset(output, options.about), "scores": store}
    if options.name:
        written["named preset"] = found.save_preset(options.name, options.about)
    return JobResult(written, _data(found), _text(found), _notes(options, written))


def _recipe(call: JobCall) -> SoftPAG:
    """The one recipe of the file."""
    (recipe, *others) = call.recipes
    if others or not isinstance(recipe, SoftPAG) or recipe.pairs:
        raise InvalidOption(
            "a hunt takes the recipe softpag alone, without heads",
            "field 'recipes'",
            "write `recipes: [softpag: {strength: 1.0, scale: 3.0}]`",
        )
    if recipe.steps is not None or recipe.targets is not None or recipe.exclude is not None:
        raise InvalidOption("a hunt covers all steps and modules", "field 'recipes'", "leave steps and targets out")
    return recipe


def _output(call: JobCall) -> Path:
    if call.output is None or call.output.suffix != ".json":
        raise InvalidOption(
            "the heads need a file to be written to", "field 'output'", "add `output: out/heads.json`, or give --output"
        )
    return call.output


def _prompts(call: JobCall) -> list[str]:
    wanted = call.options.prompts
    if isinstance(wanted, list):
        return wanted
    if wanted is None:
        given = call.inputs.get("prompt")
        return [given] if isinstance(given, str) else list(given or [])
    from patchkit.zoo import worlds

    world = worlds.of(call.model) if call.model.startswith("zoo/") else None
    if world is None or wanted > world.size:
        raise InvalidOption(
            f"{call.model} has no fixed set of {wanted} prompts", call.where("prompts"), "write the prompts as a list"
        )
    return list(world.prompts(wanted))


def _data(found: Hunt) -> dict[str, Any]:
    rounds = [{text_of(head): score for head, score in scores.items()} for scores in found.scores]
    return {"heads": [list(head) for head in found.heads], "rounds": rounds, "terms": found.terms}


def _text(found: Hunt) -> str:
    """The heads in order of selection, with the score that each reached together with those before its round."""
    rows = []
    for head in found.heads:
        number, scores = next((i, s) for i, s in reversed(list(enumerate(found.scores))) if head in s)
        rows.append((text_of(head), str(number + 1), f"{scores[head]:.4f}"))
    return table(("head", "round", "score"), rows, indent="")


def _notes(options: Options, written: dict[str, Path]) -> tuple[str, ...]:
    heads = options.name or written["preset"]
    return (f"use them: `softpag: {{heads: {heads}, strength: ...}}`; a lower strength is cheaper than a new hunt",)


JOB = Job(
    "Find the attention heads whose perturbation guides best toward an objective, and write them as a preset.\n\n"
    "Round by round, every head that is left is tried with those chosen so far; the best join them. Stopped, the same "
    "command goes on where it was. (HeadHunter, arXiv 2506.10978.)",
    Options,
    run,
    check,
)
