"""JSON schema of recipe files, made from the recipes that are registered. Editors complete and check files with it."""

from __future__ import annotations

from typing import Any

from patchkit import registry
from patchkit.recipe_files import sections
from patchkit.recipe_files.fields import DTYPES, INPUTS, OFFLOADS
from patchkit.recipe_files.files import VERSION


def schema() -> dict[str, Any]:
    """The schema as plain data."""
    definitions: dict[str, Any] = {}
    text = {"type": ["string", "null"]}
    model = {
        "type": "object",
        "properties": {
            "id": {"type": "string", "description": "zoo/NAME, a local folder or a hub id"},
            "dtype": {"enum": [*DTYPES, None]},
            "device": text | {"description": "cpu, cuda, cuda:1, mps; default: the accelerator if there is one"},
            "offload": {"enum": [*OFFLOADS, None]},
            "revision": text,
            "variant": text,
        },
        "required": ["id"],
        "additionalProperties": False,
    }
    inputs = {
        "type": "object",
        "description": "Arguments of pipe(...). Those not listed are handed on as they are.",
        "properties": {name: {"anyOf": [dict(check.schema), {"type": "null"}]} for name, check in INPUTS.items()},
        "additionalProperties": True,
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "patchkit recipe file",
        "type": "object",
        "properties": {
            "version": {"const": VERSION},
            "model": {"anyOf": [{"type": "string"}, model, {"type": "null"}]},
            "recipes": {"type": "array", "minItems": 1, "items": {"anyOf": _entries(definitions)}},
            "inputs": {"anyOf": [inputs, {"type": "null"}]},
            "output": text | {"description": "file (mp4, gif, png, txt, json) or folder, from the current folder"},
            "compare": {"enum": ["dense", False, None]},
            **_sections(definitions),
        },
        "required": ["version", "recipes"],
        "additionalProperties": False,
        "$defs": definitions,
    }


def _sections(definitions: dict[str, Any]) -> dict[str, Any]:
    """The sections of verbs; what their schemas refer to moves to the root."""

    def lift(value: Any) -> Any:
        if isinstance(value, dict):
            definitions.update({n: lift(d) for n, d in value.get("$defs", {}).items()})
            return {name: lift(v) for name, v in value.items() if name != "$defs"}
        return [lift(v) for v in value] if isinstance(value, list) else value

    lifted: dict[str, Any] = lift(sections.schema())
    return lifted


def _entries(definitions: dict[str, Any]) -> list[dict[str, Any]]:
    known = registry.all_recipes()
    entries: list[dict[str, Any]] = [{"enum": list(known)}] if known else [{"type": "string"}]
    for name, cls in known.items():
        options = cls.schema()
        for entry in options["properties"].values():
            definitions.update(entry.pop("$defs", {}))  # references in a schema start at its root
        wanted = {"anyOf": [options, {"type": "null"}], "description": cls.summary}
        entries.append(
            {"type": "object", "properties": {name: wanted}, "required": [name], "additionalProperties": False}
        )
    return entries
