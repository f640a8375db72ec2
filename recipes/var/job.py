"""`patchkit calibrate var FILE`: the sink channels of the model that a recipe file names."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from patchkit.errors import InvalidOption
from patchkit.jobs import Job, JobCall, JobProgress, JobResult
from patchkit.recipe_files.files import save_recipes
from patchkit.recipes.var import Var
from patchkit.recipes.var.probing import PROMPTS, Probe, probe
from patchkit.text import table

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
QUESTIONS = (
    "What is in this picture?",
    "Describe the background.",
    "How many things can be seen, and where are they?",
    "Which colours stand out?",
)
TEXTS = (
    "Explain in one sentence why the sky is blue.",
    "What is the capital of Portugal?",
    "Write a short poem about a river in winter.",
    "List three uses of a paper clip.",
    "Translate into French: the train leaves at noon.",
    "How long should an egg be boiled?",
    "Sum up the plot of a story that you know.",
    "What is 17 times 6?",
)

Text = Annotated[str, Field(min_length=1)]


class Options(BaseModel):
    """The section ``calibrate: {var: {...}}`` of a recipe file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    images: Text | Annotated[list[Text], Field(min_length=1)] = Field(
        description=f"a folder of pictures, or a list of files: at least {PROMPTS // 2}, of the kind that it will see"
    )
    questions: Annotated[list[Text], Field(min_length=1)] = Field(
        default=list(QUESTIONS), description="asked about the pictures, in turn"
    )
    texts: Annotated[list[Text], Field(min_length=1)] = Field(
        default=list(TEXTS), description="prompts without a picture, in turn, as many as there are pictures"
    )
    max_images: Annotated[int, Field(ge=PROMPTS // 2)] = Field(default=16, description="of the folder")


def check(call: JobCall) -> None:
    """Refuse wrong files and recipes before the model is loaded."""
    _recipe(call)
    _files(call)


def run(call: JobCall) -> JobResult:
    """Probe, file the channels in the user's registry, and write a recipe file if one is asked for."""
    options: Options = call.options
    recipe = _recipe(call)
    if call.encode is None or not call.reads_pictures:
        raise InvalidOption(
            f"{call.model} does not read pictures", "field 'model'", "name a vision-language model, such as LLaVA"
        )
    pictures = [_opened(path, call) for path in _files(call)]
    call.say(f"reading {len(pictures)} pictures with a question, and as many prompts without")
    questions, texts = itertools.cycle(options.questions), itertools.cycle(options.texts)
    prompts = [dict(call.encode(next(questions), [picture])) for picture in pictures]
    prompts += [dict(call.encode(next(texts), [])) for _ in pictures]

    def tell(done: int, total: int) -> None:
        call.progress(JobProgress(done, total, "prompts"))

    found = probe(call.target, prompts, tau=recipe.tau, layers=recipe.layers, progress=tell)
    text = _evidence(found)
    if not found.accepted:
        call.say(text)
    files = {"registry": found.save()}
    if call.output is not None:
        call.output.parent.mkdir(parents=True, exist_ok=True)
        chosen = dataclasses.replace(recipe, sink_dims=found.sink_dims)
        files["recipe"] = save_recipes([chosen], call.output)
    evidence = dataclasses.asdict(found.evidence)
    data = {"sink_dims": found.sink_dims, "model": dataclasses.asdict(found.identity), "evidence": evidence}
    return JobResult(files, data, text, ('patchkit.apply(model, "var") knows these channels from now on',))


def _recipe(call: JobCall) -> Var:
    (recipe, *others) = call.recipes
    if others or not isinstance(recipe, Var):
        raise InvalidOption("a calibration takes the recipe var alone", "field 'recipes'", "write `recipes: [var: {}]`")
    if recipe.sink_dims is not None:
        raise InvalidOption("the channels are given already", "recipe 'var', option 'sink_dims'", "leave it out")
    if call.output is not None and call.output.suffix not in (".yaml", ".yml"):
        raise InvalidOption(
            "the channels can be written into a recipe file only",
            "field 'output'",
            "write `output: out/var.yaml`, or leave it out",
        )
    return recipe


def _files(call: JobCall) -> list[Path]:
    given, where = call.options.images, call.where("images")
    if isinstance(given, list):
        found = [Path(name).expanduser() for name in given]
        for path in found:
            if not path.is_file():
                raise InvalidOption(f"there is no file {path}", where, "check the path")
    else:
        folder = Path(given).expanduser()
        if not folder.is_dir():
            raise InvalidOption(f"there is no folder {folder}", where, "name a folder of pictures, or list the files")
        found = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)[: call.options.max_images]
    if len(found) < PROMPTS // 2:
        raise InvalidOption(
            f"{len(found)} pictures tell too little", where, f"give {PROMPTS // 2} or more ({', '.join(SUFFIXES)})"
        )
    return found


def _opened(path: Path, call: JobCall) -> Any:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, ValueError) as error:
        raise InvalidOption(f"cannot read {path}: {error}", call.where("images"), "give pictures") from None


def _evidence(found: Probe) -> str:
    """The strongest channels of the first token, and what was seen of sinks."""
    seen = found.evidence
    order = sorted(seen.medians, key=lambda c: -max(seen.medians[c]))
    rows = [
        (
            str(channel),
            f"{max(seen.medians[channel]):.1f}",
            str(sum(v >= found.tau for v in seen.medians[channel])),
            "yes" if channel in found.candidates else "",
        )
        for channel in order
    ]
    head = ("channel", "largest |x| / RMS", f"layers (of {len(seen.layers)}) from {found.tau:g} on", "candidate")
    if not found.candidates:
        return table(head, rows, indent="")
    ratio = "unknown" if seen.attention_ratio is None else f"{seen.attention_ratio:.1f}"
    figures = (
        f"first token a sink in {seen.first_fires:.0%} of prompts and layers; "
        f"{seen.far_below:.0%} of tokens far below, {seen.between:.1%} between; "
        f"{seen.visual_sinks:.1f} visual sinks a picture and layer, with {ratio} times the attention of a visual token"
    )
    return f"{table(head, rows, indent='')}\n{figures}"


JOB = Job(
    "Find the sink channels of a vision-language model.\n\n"
    "The model reads pictures and prompts. The hidden state of the first token tells which channels are huge at "
    "sinks; they are accepted if few tokens are near the threshold and pictures have sinks of their own. What is "
    "found is filed for this user, so that the recipe var works on this model from then on. (VAR, arXiv 2503.03321.)",
    Options,
    run,
    check,
)
