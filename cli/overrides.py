"""Command-line options that stand in for fields of a recipe file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchkit.recipe_files.yamlread import Document

MODEL_FLAGS = ("dtype", "device", "offload", "revision", "variant")


def apply(document: Document, flags: dict[str, Any], *, strict: bool = True) -> set[str]:
    """Write the given flags into the document; they are then checked like the file's own fields.

    Args:
        document: what the file says.
        flags: by name; None = not given.
        strict: refuse a ``--set`` for a recipe that the file does not use.

    Returns:
        The recipes that a ``--set`` was meant for.
    """
    if not isinstance(document.data, dict):
        return set()  # the checks that follow say what is wrong
    given = {name: value for name, value in flags.items() if value is not None}
    _model(document, given)
    _inputs(document, given)
    if "output" in given:
        document.put(("output",), given["output"], "--output")
    if "compare" in given:
        document.put(("compare",), "dense" if given["compare"] else None, "--compare")
    return {name for text in given.get("set", ()) if (name := _set(document, text, strict))}


def _model(document: Document, given: dict[str, Any]) -> None:
    current = document.data.get("model")
    if "model" in given:
        kept = {k: v for k, v in current.items() if k in ("dtype", "device", "offload")} if _mapping(current) else {}
        if kept:
            document.put(("model", "id"), given["model"], "--model")
            for name in ("revision", "variant"):  # of the model that was replaced
                document.data["model"].pop(name, None)
        else:
            document.put(("model",), given["model"], "--model")
    for name in MODEL_FLAGS:
        if name in given:
            current = document.data.get("model")
            if isinstance(current, str):
                place = document.places.get(("model",), document.source)
                document.put(("model",), {"id": current}, place)
            if _mapping(document.data.get("model")) or current is None:
                document.put(("model", name), given[name], f"--{name}")


def _inputs(document: Document, given: dict[str, Any]) -> None:
    from patchkit.recipe_files.fields import INPUTS

    if document.data.get("inputs") is not None and not _mapping(document.data["inputs"]):
        return
    for name, value in _pipeline_kwargs(given).items():
        document.put(("inputs", name), value, "--pipeline-kwargs")
    for name in (*INPUTS, "fps"):
        if name in given:
            document.put(("inputs", name), given[name], "--" + name.replace("_", "-"))


def _pipeline_kwargs(given: dict[str, Any]) -> dict[str, Any]:
    from patchkit.errors import InvalidOption

    text = given.get("pipeline_kwargs")
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InvalidOption(f"this is not JSON: {error}", "--pipeline-kwargs", """write '{"eta": 0.5}'""") from None
    if not _mapping(value):
        raise InvalidOption("this is not a JSON object", "--pipeline-kwargs", """write '{"eta": 0.5}'""")
    return value


def _set(document: Document, text: str, strict: bool) -> str | None:
    from patchkit.errors import InvalidOption, nearest
    from patchkit.recipe_files.yamlread import read_value

    target, equals, value = text.partition("=")
    name, dot, option = target.strip().partition(".")
    place = f"--set {text}"
    if not equals or not dot or not name or not option:
        raise InvalidOption(
            f"cannot read {text!r}", "--set", "write recipe.option=value (or verb.option=value): adaspa.density=0.3"
        )
    section = _section(name, option)
    if section is not None:
        document.put(section, read_value(value, place), place)
        return name
    entries = document.data.get("recipes")
    if not isinstance(entries, list):
        return None
    names = [e if isinstance(e, str) else next(iter(e), "") if _mapping(e) else "" for e in entries]
    if name not in names:
        if strict:
            raise InvalidOption(f"the file does not use a recipe {name!r}", place, nearest(name, filter(None, names)))
        return None
    i = names.index(name)
    if isinstance(entries[i], str):
        entries[i] = {name: {}}
    if entries[i][name] is None:
        entries[i][name] = {}
    if _mapping(entries[i][name]):
        document.put(("recipes", i, name, option), read_value(value, place), place)
    return name


def _section(name: str, option: str) -> tuple[str, ...] | None:
    """Where a setting of a verb belongs: ``headhunt.rounds``, ``calibrate.var.samples``; None for a recipe's option."""
    from patchkit import jobs, registry

    if name in registry.all_recipes():
        return None
    path = (name, *option.split("."))
    found = [verb.path for verb in jobs.verbs().values() if path[: len(verb.path)] == verb.path]
    return path if found and len(path) > len(found[0]) else None


def refuse_unused(settings: Sequence[str], used: set[str]) -> None:
    """Raise for a ``--set`` that no file had a use for."""
    from patchkit.errors import InvalidOption, nearest

    for text in settings:
        name = text.partition(".")[0].strip()
        if name not in used:
            raise InvalidOption(f"no recipe {name!r} takes part", f"--set {text}", nearest(name, used))


def _mapping(value: Any) -> bool:
    return isinstance(value, dict)
