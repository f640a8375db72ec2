"""The sections of a recipe file that belong to verbs of recipes, such as ``headhunt: {rounds: 2}``."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from patchkit import jobs
from patchkit.errors import PatchkitError, RecipeFileError, nearest
from patchkit.recipe_files.fields import kind
from patchkit.recipe_files.yamlread import Document, Keys

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from pydantic import BaseModel


def keys() -> set[str]:
    """The fields of a recipe file that are such sections."""
    return {verb.path[0] for verb in jobs.verbs().values()}


def read(document: Document) -> dict[str, BaseModel]:
    """The sections that are there, verb -> options, checked. Imports the verbs whose sections are there, no others."""
    found = {}
    for key in sorted(keys() & set(document.data)):
        mine = {verb.path: verb for verb in jobs.verbs().values() if verb.path[0] == key}
        given = _mapping(document, (key,), document.data[key])
        if (key,) in mine:
            found[key] = check(document, mine[key,])
            continue
        for word in given:
            if (key, word) not in mine:
                raise RecipeFileError(
                    f"there is no verb '{key} {word}'",
                    document.where((key, word)),
                    nearest(str(word), [p[1] for p in mine]),
                )
            found[f"{key}.{word}"] = check(document, mine[key, word])
    return found


def check(document: Document, verb: jobs.Verb) -> BaseModel:
    """The options of a verb, from its section; of a section that is not there, from nothing."""
    from pydantic import ValidationError

    data: Any = document.data
    for word in verb.path:
        data = _mapping(document, verb.path, data).get(word)
    model = verb.load().options
    given = _mapping(document, verb.path, data)
    try:
        return model.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        path = (*verb.path, *first["loc"])
        if first["type"] == "extra_forbidden":
            raise RecipeFileError(
                f"{verb.name} has no option {first['loc'][-1]!r}",
                document.where(path),
                nearest(str(first["loc"][-1]), model.model_fields),
            ) from None
        what = "it is missing" if first["type"] == "missing" else f"{first.get('input')!r} does not fit"
        reason = first["msg"][0].lower() + first["msg"][1:]
        about = _about(model, first["loc"])
        raise RecipeFileError(
            f"{'.'.join(map(str, first['loc']))}: {what}", document.where(path), f"{reason}{about}"
        ) from None


def _about(model: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    field = model.model_fields.get(str(loc[0])) if loc else None
    return f" ({field.description})" if field is not None and field.description else ""


def _mapping(document: Document, path: Keys, value: Any) -> dict[Any, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        name = path[-1]
        raise RecipeFileError(
            f"{name} is {kind(value)}", document.where(path), f"write a mapping: `{name}: {{option: value}}`"
        )
    return value


def schema() -> dict[str, Any]:
    """JSON schema of all sections, key -> schema, with what they refer to under ``$defs`` of each."""
    found: dict[str, Any] = {}
    for verb in jobs.verbs().values():
        try:
            job = verb.load()
        except PatchkitError as error:  # somebody else's package must not take the schema down
            logger.warning("%s", error)
            continue
        own = job.options.model_json_schema() | {"description": verb.help}
        if len(verb.path) == 1:
            found[verb.name] = {"anyOf": [own, {"type": "null"}]}
            continue
        key, word = verb.path
        group = found.setdefault(key, {"type": ["object", "null"], "properties": {}, "additionalProperties": False})
        group["properties"][word] = {"anyOf": [own, {"type": "null"}]}
    return found
