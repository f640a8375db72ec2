"""Recipe files: which model, which recipes with which options, which inputs, and where the result goes.

A file is checked completely before a model is loaded or anything is written. Every error names file and line, the
field, what is wrong and what to do. Paths in a file are relative to the current folder, not to the file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from patchkit import registry
from patchkit.errors import InvalidOption, RecipeFileError, nearest
from patchkit.recipe_base import Recipe
from patchkit.recipe_files import fields, sections
from patchkit.recipe_files.fields import ModelSpec, Output
from patchkit.recipe_files.yamlread import Document, Keys, read_file, read_text, scalar

if TYPE_CHECKING:
    from pydantic import BaseModel

VERSION = 1
FIELDS = ("version", "model", "recipes", "inputs", "output", "compare")

_OPTION = re.compile(r"option '(\w+)'")


@dataclass(frozen=True)
class RecipeFile:
    """A checked recipe file.

    ``model``, ``inputs`` and ``output`` may be missing in a file that only carries recipes (as ``Patch.save`` writes);
    :meth:`require` says what a run needs.
    """

    recipes: tuple[Recipe, ...]
    model: ModelSpec | None = None
    inputs: Mapping[str, Any] = field(default_factory=dict)
    output: Output | None = None
    compare: bool = False
    jobs: Mapping[str, BaseModel] = field(default_factory=dict)  # verb -> its section
    source: str = ""
    document: Document | None = field(default=None, repr=False, compare=False)

    def where(self, *path: str | int) -> str:
        """The place of a field, for messages."""
        return self.document.where(path) if self.document else f"field {'.'.join(map(str, path))!r}"

    def require(self, *, prompt: bool = True, output: bool = True) -> None:
        """Raise :class:`RecipeFileError` unless this file says what a run needs."""
        if self.model is None:
            raise RecipeFileError("no model is named", self.where("model"), "add `model: zoo/video`, or give --model")
        if prompt and not self.inputs.get("prompt"):
            raise RecipeFileError(
                "the prompt is missing",
                self.where("inputs", "prompt"),
                'add `prompt: "..."` under `inputs:`, or give --prompt',
            )
        if output and self.output is None:
            raise RecipeFileError(
                "no output is named", self.where("output"), "add `output: out/result.mp4`, or give --output"
            )


def load(path: str | Path, change: Callable[[Document], None] | None = None) -> RecipeFile:
    """Read and check a recipe file; ``change`` may edit the document first (command-line options do)."""
    document = read_file(path)
    if change:
        change(document)
    return parse(document)


def parse(document: Document) -> RecipeFile:
    """Check a document and make a :class:`RecipeFile` of it."""
    data = document.data
    if not isinstance(data, dict):
        raise RecipeFileError(
            f"a recipe file is a mapping, this is {fields.kind(data)}", document.where(), "start with `version: 1`"
        )
    fields.known_keys(document, (), (*FIELDS, *sections.keys()))
    if "version" not in data:
        raise RecipeFileError("the version is missing", document.where(("version",)), f"add `version: {VERSION}`")
    if data["version"] != VERSION or isinstance(data["version"], bool | float):
        raise RecipeFileError(
            f"version {data['version']!r} is not known here",
            document.where(("version",)),
            f"this patchkit reads version {VERSION}; a newer file needs a newer patchkit",
        )
    return RecipeFile(
        recipes=_recipes(document),
        model=fields.model(document) if data.get("model") is not None else None,
        inputs=fields.inputs(document),
        output=fields.output(document),
        compare=fields.compare(document),
        jobs=sections.read(document),
        source=document.source,
        document=document,
    )


def _recipes(document: Document) -> tuple[Recipe, ...]:
    data = document.data
    entries = data.get("recipes")
    if not isinstance(entries, list) or not entries:
        what = "the list of recipes is missing" if entries is None else f"recipes is {fields.kind(entries)}"
        what = "the list of recipes is empty" if entries == [] else what
        raise RecipeFileError(
            what, document.where(("recipes",)), "write a list: `recipes: [adaspa]`; see `patchkit list`"
        )
    out: list[Recipe] = []
    for i, entry in enumerate(entries):
        name, options = _entry(document, ("recipes", i), entry)
        recipe = _build(document, ("recipes", i, name), name, options)
        if recipe in out:  # with other options it may make sense: other layers, other steps
            raise RecipeFileError(
                f"recipe {name!r} stands here a second time, with the same options",
                document.where(("recipes", i)),
                "keep one of them",
            )
        out.append(recipe)
    return tuple(out)


def _entry(document: Document, path: Keys, entry: Any) -> tuple[str, dict[str, Any]]:
    """A list entry is a name, or one name with its options."""
    if isinstance(entry, str):
        return entry, {}
    if not isinstance(entry, dict) or len(entry) != 1:
        what = f"a mapping of {len(entry)} recipes" if isinstance(entry, dict) else fields.kind(entry)
        raise RecipeFileError(
            f"an entry is a recipe's name or `name: {{options}}`, this is {what}",
            document.where(path),
            "start each recipe with its own dash and indent its options below it",
        )
    ((name, options),) = entry.items()
    if options is not None and not isinstance(options, dict):
        raise RecipeFileError(
            f"the options of {name!r} are {fields.kind(options)}",
            document.where((*path, name)),
            f"write a mapping: `{name}: {{option: value}}`",
        )
    return name, options or {}


def _build(document: Document, path: Keys, name: str, options: dict[str, Any]) -> Recipe:
    known = registry.all_recipes()
    if name not in known:
        raise RecipeFileError(f"there is no recipe {name!r}", document.where(path), nearest(name, known))
    for option in options:
        existing = known[name].option_names()
        if option not in existing:
            raise RecipeFileError(
                f"recipe {name!r} has no option {option!r}",
                document.where((*path, option)),
                nearest(option, existing),
            )
    try:
        return known[name].build(options)
    except InvalidOption as error:
        found = _OPTION.search(error.where)
        where = document.where((*path, found[1]) if found and found[1] in options else path)
        remedy = error.remedy or f"see `patchkit info {name}`"
        raise RecipeFileError(error.what, where, remedy) from None


class _Dumper(yaml.SafeDumper):
    """Quotes what our reader, or a YAML 1.1 reader, would not take as text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True  # the same list given twice must be written twice: references are not allowed


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    style = '"' if "\n" in value or not isinstance(scalar(value), str) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def dump(
    recipes: Sequence[Recipe],
    *,
    model: ModelSpec | None = None,
    inputs: Mapping[str, Any] | None = None,
    output: str | None = None,
    compare: bool = False,
    comment: str = "",
) -> str:
    """A recipe file as text; :func:`parse` of it gives the same recipes. ``comment`` becomes its first lines."""
    data: dict[str, Any] = {"version": VERSION}
    if model is not None:
        given = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
        extra = {n: v for n, v in given.items() if n != "id" and v is not None and (n, v) != ("offload", "none")}
        data["model"] = {"id": model.id, **extra} if extra else model.id
    entries = [(r.name, _plain(r.options())) for r in recipes]
    data["recipes"] = [{name: options} if options else name for name, options in entries]
    if inputs:
        data["inputs"] = _plain(dict(inputs))
    if output:
        data["output"] = output
    if compare:
        data["compare"] = "dense"
    header = "".join(f"# {line}\n" if line else "#\n" for line in comment.splitlines())
    return header + yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def load_recipes(path: str | Path) -> list[Recipe]:
    """The recipes of a recipe file."""
    return list(load(path).recipes)


def save_recipes(recipes: Sequence[Recipe], path: str | Path, **more: Any) -> Path:
    """Write :func:`dump`'s text to ``path``, whole or not at all."""
    path = Path(path).expanduser()
    comment = (
        "Written by patchkit. Apply it with patchkit.apply(pipe, path), or add `model:`, `inputs:` and `output:`\n"
    )
    text = dump(recipes, **{"comment": comment + "and run it with `patchkit run`.", **more})
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise RecipeFileError(
            f"cannot write the recipe file: {error.strerror or error}", str(path), "choose a folder you can write to"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    return path


def _plain(value: Any) -> Any:
    """Options as YAML knows them."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in value]
    if isinstance(value, Enum):
        return _plain(value.value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    return str(value) if isinstance(value, Path) else value


def examples() -> dict[str, str]:
    """The recipe files that come with patchkit, name -> text. A recipe's own example bears the recipe's name."""
    folder = resources.files("patchkit.recipes") / "examples"
    if not folder.is_dir():
        return {}
    found = [entry for entry in folder.iterdir() if entry.name.endswith(".yaml")]
    return {entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8") for entry in sorted(found, key=str)}


def locate(name: str) -> Document:
    """The document behind what a user typed: a path to a recipe file, or the name of a recipe or shipped example.

    A recipe without an example gives a document that names nothing but the recipe.
    """
    if Path(name).expanduser().is_file() or name.endswith((".yaml", ".yml")) or "/" in name or os.sep in name:
        return read_file(name)
    shipped = examples()
    found = [n for n in shipped if n == name] or [n for n in shipped if n.startswith((f"{name}-", f"{name}_"))]
    if found:
        return read_text(shipped[found[0]], f"example {found[0]}.yaml")
    if name in registry.all_recipes():
        return Document({"version": VERSION, "recipes": [name]}, f"recipe {name}")
    if Path(name).exists():
        return read_file(name)  # says what is wrong with it
    raise RecipeFileError(
        f"there is neither a file nor a recipe {name!r}", name, nearest(name, {*shipped, *registry.all_recipes()})
    )
