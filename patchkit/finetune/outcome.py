"""What a training leaves behind: the adapter, or the model, a recipe file that runs it, and its figures."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from patchkit.jobs import JobCall, JobResult
from patchkit.recipe_base import Recipe
from patchkit.text import duration, table

RESULT, RECIPE = "training.json", "recipe.yaml"


def is_main() -> bool:
    """Whether this process is the one of several that writes."""
    return int(os.environ.get("RANK", "0")) == 0


def save_adapter(model: Any, folder: Path) -> None:
    """All of it or nothing: into a folder of its own, then file by file over the old names, the configuration last."""
    part = folder / ".adapter"
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    files = sorted(part.iterdir(), key=lambda path: path.name == "adapter_config.json")
    for path in files:
        if path.name != "README.md":
            os.replace(path, folder / path.name)
    shutil.rmtree(part, ignore_errors=True)


def recipe_file(call: JobCall, recipe: Recipe, folder: Path) -> str:
    """A recipe file that runs what was trained, beside the untuned and unpatched model."""
    import yaml

    model: Any = str(folder / "model") if call.options.weights == "all" else call.model
    if call.loaded_as:
        kept = {"dtype": call.loaded_as["dtype"]} if "dtype" in call.loaded_as else {}
        model = {"id": model} | (kept if call.options.weights == "all" else dict(call.loaded_as))
    document: dict[str, Any] = {"version": 1, "model": model, "recipes": [{recipe.name: {"adapter": str(folder)}}]}
    document |= {"inputs": dict(call.inputs), "output": str(folder / "sample.txt"), "compare": "dense"}
    return yaml.safe_dump(document, sort_keys=False)


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """In place of what the folder held, once all of it is written."""
    part = folder.with_name(f".{folder.name}")
    shutil.rmtree(part, ignore_errors=True)
    with _quiet():
        model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar of transformers' own among ours."""
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def write(path: Path, text: str) -> None:
    """All of a file or nothing."""
    from patchkit.media import replacing

    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def result(found: dict[str, Any], folder: Path, whole: bool, recipe: str) -> JobResult:
    """What the user is told. ``whole``: whether the model's own weights were trained."""
    rows = [("untuned, unpatched", f"{found['dense']['perplexity']:.3f}", "", "")]
    for name, what in (("tuned", "the recipe"), ("baseline", "unpatched")):
        if name in found:
            part = found[name]
            cost = f"{part['tokens']:,}", duration(part["seconds"])
            rows.append((f"{what}, before tuning", f"{part['before']:.3f}", "0", ""))
            rows.append((f"{what}, after tuning", f"{part['after']:.3f}", *cost))
    files = {"adapter": folder, "recipe": folder / RECIPE, "log": folder / "training.jsonl", "result": folder / RESULT}
    if whole:
        files["model"] = folder / "model"
    text = table(("model", "perplexity (held out)", "tokens", "time"), rows, indent="")
    notes: tuple[str, ...] = (
        f"use it: patchkit run {folder / RECIPE}, or patchkit.apply(model, {recipe!r}, adapter={str(folder)!r}), or "
        "peft's own from_pretrained",
    )
    data = {name: value for name, value in found.items() if name != "facts"}
    if not all(math.isfinite(found["tuned"][key]) for key in ("before", "after")):
        notes = (*notes, "a perplexity is not finite: the learning rate is too high, or the text too short")
    return JobResult(files, data, text, notes)
