"""`patchkit train FILE`: tune the model that a recipe file names for the recipe that it names."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from patchkit.adapters.base import unwrap
from patchkit.errors import InvalidOption
from patchkit.finetune import outcome
from patchkit.jobs import Job, JobCall, JobProgress, JobResult
from patchkit.recipe_base import Recipe

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj")


class Options(BaseModel):
    """The section ``train: {...}`` of a recipe file."""

    model_config = ConfigDict(extra="forbid")

    text: str | list[str] | None = Field(default=None, description="text files; the story that ships with patchkit")
    held_out: Share = Field(default=0.1, description="share of the text, its end, that is evaluated and not learned")
    window: Annotated[int, Field(ge=8)] = Field(default=256, description="tokens of a row")
    batch: Count = Field(default=8, description="rows of a step, over all processes and parts")
    accumulate: Count = Field(default=1, description="parts that a step is computed in")
    steps: Count = Field(default=200, description="steps of the optimiser")
    lr: Annotated[float, Field(gt=0)] = Field(default=2e-4, description="greatest learning rate")
    warmup: Share = Field(default=0.05, description="share of the steps in which the rate rises")
    schedule: Literal["cosine", "constant"] = Field(default="cosine", description="of the rate after that")
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=0.0, description="of AdamW")
    clip: Annotated[float, Field(ge=0)] = Field(default=1.0, description="greatest norm of the gradients; 0 = no limit")
    precision: Literal["no", "bf16"] = Field(default="no", description="mixed precision, as accelerate has it")
    checkpointing: bool = Field(default=False, description="compute activations again: slower, less memory")
    weights: Literal["lora", "all"] = Field(default="lora", description="train LoRA layers, or all weights")
    rank: Count = Field(default=16, description="of the LoRA layers")
    lora_targets: list[str] | None = Field(default=None, description="their modules; q, k, v and o projections")
    balance: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="weight of the recipe's auxiliary loss; its own default"
    )
    baseline: bool = Field(default=False, description="tune the unpatched model, too, with as many steps, to compare")
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="of weights, order and dropout")
    save_every: Count = Field(default=50, description="steps between checkpoints")
    evaluate_every: Count = Field(default=50, description="steps between evaluations")


def check(call: JobCall) -> None:
    """Refuse a wrong recipe, output or text before the model is loaded."""
    from patchkit.finetune import require

    require()
    _recipe(call)
    _text(call)
    if call.output is None or not call.in_folder:
        raise InvalidOption("the adapter goes into a folder", "field 'output'", "write `output: out/tuned/`")


def run(call: JobCall) -> JobResult:
    """Train, or go on training, and write the adapter."""
    from patchkit.locking import alone_in

    folder = call.output
    assert folder is not None
    recipe = _recipe(call)
    if call.tokenizer is None or not hasattr(call.target, "get_output_embeddings"):
        raise InvalidOption(f"{call.model} is no language model", "field 'model'", "this verb trains on text")
    if not outcome.is_main():
        return _train(call, recipe, folder)
    with alone_in(folder, "a training"):
        return _train(call, recipe, folder)


def _train(call: JobCall, recipe: Recipe, folder: Path) -> JobResult:
    options: Options = call.options
    facts = _facts(call, recipe)
    known = _finished(folder, facts)
    if known is not None:
        call.say(f"{folder} holds this training, finished")
        return outcome.result(known, folder, options.weights == "all", recipe.name)
    start = None
    if options.weights == "all" and options.baseline:
        start = {name: value.detach().clone() for name, value in call.target.state_dict().items()}
    result: dict[str, Any] = {"facts": facts, "dense": _quality(call, call.target)}
    courses = [("tuned", recipe)] + ([("baseline", None)] if options.baseline else [])
    for name, which in courses:
        if name == "baseline" and start is not None:
            call.target.load_state_dict(start)
        result[name] = _one(call, which, folder if which is not None else folder / "baseline", name, len(courses))
    if outcome.is_main():
        outcome.write(folder / outcome.RECIPE, outcome.recipe_file(call, recipe, folder))
        outcome.write(folder / outcome.RESULT, json.dumps(result, indent=1))
        for name in ("", "baseline"):
            (folder / name / "checkpoint.pt").unlink(missing_ok=True)
    return outcome.result(result, folder, options.weights == "all", recipe.name)


def _one(call: JobCall, recipe: Recipe | None, folder: Path, name: str, courses: int) -> dict[str, Any]:
    """Tune the model for a recipe, or for none; leaves it untuned (but for weights that were trained themselves)."""
    import torch

    from patchkit.finetune.loop import Course, Training

    options: Options = call.options
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)  # of new weights
    model = _adapted(call, recipe)
    adapter = model is not call.target
    if options.weights == "all":
        model.requires_grad_(True)
    course = Course(**{f: getattr(options, f) for f in Course.__dataclass_fields__})
    offset = 0 if name == "tuned" else options.steps

    def tell(done: int, left: float | None) -> None:
        rest = left * (courses if name == "tuned" else 1) if left is not None else None
        call.progress(JobProgress(offset + done, courses * options.steps, name, rest))

    training = Training(
        model,
        _rows(call),
        course,
        folder,
        _facts(call, recipe),
        lambda tuned: _quality(call, tuned),
        _auxiliary,
        tell,
    )
    log = training.run()
    if outcome.is_main() and adapter:
        outcome.save_adapter(model, folder)
    base = model.unload() if adapter else model
    if outcome.is_main() and options.weights == "all":
        outcome.save_model(base, call.tokenizer, folder / "model")
    evaluated = [row for row in log if "perplexity" in row]
    return {
        "before": evaluated[0]["perplexity"],
        "after": evaluated[-1]["perplexity"],
        "tokens": log[-1]["tokens"],
        "seconds": round(sum(row.get("seconds", 0.0) for row in log), 1),
        "curve": [[row["step"], row["perplexity"]] for row in evaluated],
    }


def _adapted(call: JobCall, recipe: Recipe | None) -> Any:
    from peft import LoraConfig, get_peft_model

    options: Options = call.options
    if recipe is None and options.weights == "all":
        return call.target
    lora: dict[str, Any] = {"r": options.rank, "lora_alpha": 2 * options.rank}
    lora["target_modules"] = options.lora_targets or _targets(call.target)
    if recipe is None:
        return get_peft_model(call.target, LoraConfig(**lora))
    config = recipe.tuning(lora if options.weights == "lora" else None)
    if options.balance is not None:
        config.balance = options.balance
    return get_peft_model(call.target, config)


def _targets(model: Any) -> list[str]:
    """The usual projections, or where they are called otherwise every linear layer of the blocks."""
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    found = [name for name in LAYERS if name in names]
    return found or [name for name in ("c_attn", "query", "key", "value", "query_key_value") if name in names]


def _auxiliary(model: Any) -> dict[str, float]:
    passage = vars(unwrap(model)).get("_patchkit_passage")
    loss = getattr(getattr(passage, "collector", None), "latest", None)
    return {} if loss is None else {"auxiliary": float(loss.detach())}


def _quality(call: JobCall, model: Any) -> dict[str, float]:
    """Perplexity of the text that is held out; of what is learned, where nothing is held out."""
    from patchkit.finetune.rows import split
    from patchkit.text_metrics import perplexity

    options: Options = call.options
    learned, held = split(_text(call), options.held_out)
    training = model.training
    model.eval()
    try:
        found = perplexity(model, call.tokenizer, held or learned, options.window, max(1, options.window // 2))
    except InvalidOption as error:
        raise InvalidOption(f"held out: {error.what}", call.where("text"), "give more text, or hold out more") from None
    finally:
        model.train(training)
    return {"perplexity": found.value}


def _rows(call: JobCall) -> Any:
    from patchkit.finetune.rows import Rows, split

    options: Options = call.options
    learned, _ = split(_text(call), options.held_out)
    return Rows.of(learned, call.tokenizer, options.window, options.seed, call.where("text"))


# --- what is asked for ----------------------------------------------------------------------------------------------


def _recipe(call: JobCall) -> Recipe:
    (recipe, *others) = call.recipes
    if others or not recipe.wraps("tuning"):
        raise InvalidOption(
            f"{recipe.name} cannot be tuned for" if not others else "several recipes",
            "field 'recipes'",
            "name one recipe, of those that bring an adapter",
        )
    if getattr(recipe, "adapter", None) is not None:
        raise InvalidOption(
            "a trained adapter is not trained further", f"recipe {recipe.name!r}, option 'adapter'", "leave it out"
        )
    return recipe


def _text(call: JobCall) -> str:
    given = call.options.text
    if given is None:
        from patchkit import zoo

        return zoo.prose()
    parts = []
    for name in [given] if isinstance(given, str) else given:
        try:
            parts.append(Path(name).expanduser().read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidOption(
                f"cannot read {name}: {error}", call.where("text"), "name text files in UTF-8"
            ) from None
    text = "\n\n".join(parts)
    if not text.strip():
        raise InvalidOption("there is no text in it", call.where("text"), "name text files that hold some")
    return text


def _facts(call: JobCall, recipe: Recipe | None) -> dict[str, Any]:
    """What makes two trainings the same one."""
    digest = hashlib.sha256(_text(call).encode()).hexdigest()
    facts = {"model": call.model, "text": digest, "section": call.options.model_dump(exclude={"text", "save_every"})}
    if call.loaded_as:
        facts["loaded_as"] = dict(call.loaded_as)
    return facts | {"recipe": None if recipe is None else {recipe.name: recipe.options()}}


def _finished(folder: Path, facts: dict[str, Any]) -> dict[str, Any] | None:
    path = folder / outcome.RESULT
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    from patchkit.finetune.loop import differing

    other = differing(found.get("facts") or {}, json.loads(json.dumps(facts)))
    if not other:
        return found
    raise InvalidOption(
        f"another training was finished in this folder (other {', '.join(other)})",
        f"field 'output': {folder}",
        "name another, or delete it",
    )


JOB = Job(
    "Tune a language model for the recipe of the file.\n\n"
    "LoRA layers and the recipe's own parameters are trained on text, with accelerate underneath (`accelerate launch` "
    "starts several processes). The output folder is an adapter of peft. Stopped, the same command goes on and ends "
    "with the same weights.",
    Options,
    run,
    check,
)
