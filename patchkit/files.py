"""Recipe files: which model, which recipes with which options, which inputs, and where the result goes.

A file is checked completely before a model is loaded or anything is written. Every error names file and line, the
field, what is wrong and what to do. Paths in a file are relative to the current folder, not to the file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from patchkit import registry
from patchkit.errors import InvalidOption, RecipeFileError, nearest
from patchkit.recipe import Recipe
from patchkit.yamlread import Document, Keys, read_file

VERSION = 1
FIELDS = ("version", "model", "recipes", "inputs", "output", "compare")
MODEL_FIELDS = ("id", "dtype", "device", "offload", "revision", "variant")
DTYPES = ("auto", "float16", "fp16", "bfloat16", "bf16", "float32", "fp32")  # as diffusers-cli
OFFLOADS = ("none", "model", "sequential")
VIDEO_SUFFIXES = (".mp4", ".gif")
SUFFIXES = (*VIDEO_SUFFIXES, ".png", ".txt", ".json")
MAX_SEED = 2**63 - 1

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DEVICE = re.compile(r"(cpu|cuda|mps|xpu|hpu|npu)(:\d+)?")
_OPTION = re.compile(r"option '(\w+)'")


@dataclass(frozen=True)
class ModelSpec:
    """Which model, and how to load it; the fields are diffusers' own options.

    Args:
        id: ``zoo/NAME``, a local folder, or a hub id such as ``owner/name``.
        dtype: one of :data:`DTYPES`; None = what the library takes.
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``; None = the accelerator if there is one, else the CPU.
        offload: ``none``, ``model`` or ``sequential`` (weights wait on the CPU until they are needed).
        revision: branch, tag or commit of a hub model.
        variant: weight variant, such as ``fp16``.
    """

    id: str
    dtype: str | None = None
    device: str | None = None
    offload: str = "none"
    revision: str | None = None
    variant: str | None = None

    @property
    def zoo(self) -> str | None:
        """The zoo name without ``zoo/``, or None."""
        return self.id[4:] if self.id.startswith("zoo/") else None


@dataclass(frozen=True)
class RecipeFile:
    """A checked recipe file.

    ``model``, ``inputs`` and ``output`` may be missing in a file that only carries recipes (as ``Patch.save`` writes);
    :meth:`require` says what a run needs.
    """

    recipes: tuple[Recipe, ...]
    model: ModelSpec | None = None
    inputs: Mapping[str, Any] = field(default_factory=dict)
    output: Path | None = None
    compare: bool = False
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
            f"a recipe file is a mapping, this is {_kind(data)}", document.where(), "start with `version: 1`"
        )
    _known_keys(document, (), FIELDS)
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
        model=_model(document) if data.get("model") is not None else None,
        inputs=_inputs(document),
        output=_output(document),
        compare=_compare(document),
        source=document.source,
        document=document,
    )


def _recipes(document: Document) -> tuple[Recipe, ...]:
    data = document.data
    entries = data.get("recipes")
    if isinstance(entries, str):
        entries = data["recipes"] = [entries]
    if not isinstance(entries, list) or not entries:
        what = "the list of recipes is missing" if entries is None else f"recipes is {_kind(entries)}"
        what = "the list of recipes is empty" if entries == [] else what
        raise RecipeFileError(what, document.where(("recipes",)), "write a list: `recipes: [adaspa]`; see `patchkit list`")
    out: list[Recipe] = []
    for i, entry in enumerate(entries):
        name, options = _entry(document, ("recipes", i), entry)
        if name in (r.name for r in out):
            raise RecipeFileError(
                f"recipe {name!r} stands here a second time", document.where(("recipes", i)), "keep one of them"
            )
        out.append(_build(document, ("recipes", i, name), name, options))
    return tuple(out)


def _entry(document: Document, path: Keys, entry: Any) -> tuple[str, dict[str, Any]]:
    """A list entry is a name, or one name with its options."""
    if isinstance(entry, str):
        return entry, {}
    if not isinstance(entry, dict) or len(entry) != 1:
        what = f"a mapping of {len(entry)} recipes" if isinstance(entry, dict) else _kind(entry)
        raise RecipeFileError(
            f"an entry is a recipe's name or `name: {{options}}`, this is {what}",
            document.where(path),
            "start each recipe with its own dash and indent its options below it",
        )
    ((name, options),) = entry.items()
    if options is not None and not isinstance(options, dict):
        raise RecipeFileError(
            f"the options of {name!r} are {_kind(options)}",
            document.where((*path, name)),
            f"write a mapping: `{name}: {{option: value}}`",
        )
    return name, options or {}


def _build(document: Document, path: Keys, name: str, options: dict[str, Any]) -> Recipe:
    known = registry.all_recipes()
    if name not in known:
        raise RecipeFileError(f"there is no recipe {name!r}", document.where(path), nearest(name, known))
    for option in options:
        fields = known[name].__dataclass_fields__
        if option not in fields:
            raise RecipeFileError(
                f"recipe {name!r} has no option {option!r}", document.where((*path, option)), nearest(option, fields)
            )
    try:
        return known[name].build(options)
    except InvalidOption as error:
        found = _OPTION.search(error.where)
        where = document.where((*path, found[1]) if found and found[1] in options else path)
        remedy = error.remedy or f"see `patchkit info {name}`"
        raise RecipeFileError(error.what, where, remedy) from None


def _model(document: Document) -> ModelSpec:
    data = document.data["model"]
    if isinstance(data, str):
        return ModelSpec(_model_id(document, ("model",), data))
    if not isinstance(data, dict):
        raise RecipeFileError(
            f"model is {_kind(data)}",
            document.where(("model",)),
            "give zoo/NAME, a folder, a hub id, or `{id: ..., dtype: ...}`",
        )
    _known_keys(document, ("model",), MODEL_FIELDS)
    for name, value in data.items():
        if value is not None and not isinstance(value, str):
            hint = f'write it as text: `{name}: "{value}"`' if isinstance(value, int | float) else "give text"
            raise RecipeFileError(f"{name} is {_kind(value)}", document.where(("model", name)), hint)
    if not data.get("id"):
        raise RecipeFileError(
            "the model's id is missing", document.where(("model", "id")), "add `id: zoo/video`, a folder or a hub id"
        )
    _one_of(document, ("model", "dtype"), DTYPES)
    _one_of(document, ("model", "offload"), OFFLOADS)
    device = data.get("device")
    if device is not None and not _DEVICE.fullmatch(device):
        raise RecipeFileError(
            f"{device!r} is no device", document.where(("model", "device")), "give cpu, cuda, cuda:1 or mps"
        )
    chosen = {name: value for name, value in data.items() if value is not None}
    return ModelSpec(**{**chosen, "id": _model_id(document, ("model", "id"), data["id"])})


def _model_id(document: Document, path: Keys, name: str) -> str:
    if name == "zoo" or name.startswith("zoo/"):
        from patchkit import zoo

        if name[4:] not in zoo.names():
            known = [f"zoo/{n}" for n in zoo.names()]
            raise RecipeFileError(f"there is no zoo model {name!r}", document.where(path), nearest(name, known))
        return name
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not any((folder / index).is_file() for index in ("model_index.json", "config.json")):
            raise RecipeFileError(
                f"the folder {name} holds no saved model",
                document.where(path),
                "give a folder with a model_index.json (diffusers) or config.json (transformers)",
            )
        return str(folder)
    if folder.is_file():
        raise RecipeFileError(
            f"{name} is a file", document.where(path), "give the folder that save_pretrained wrote, or a hub id"
        )
    if name.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(name):
        raise RecipeFileError(
            f"{name!r} is neither a zoo model, nor a folder that exists, nor a hub id",
            document.where(path),
            "give zoo/video, ./folder or owner/name",
        )
    return name


def _inputs(document: Document) -> dict[str, Any]:
    inputs = document.data.get("inputs")
    if inputs is None:
        return {}
    if not isinstance(inputs, dict):
        raise RecipeFileError(
            f"inputs is {_kind(inputs)}", document.where(("inputs",)), 'write a mapping: `inputs: {prompt: "..."}`'
        )
    for name, value in inputs.items():
        check = INPUTS.get(name)
        if check and value is not None and not check.holds(value):
            raise RecipeFileError(
                f"{name} is {value!r}" if isinstance(value, str | int | float) else f"{name} is {_kind(value)}",
                document.where(("inputs", name)),
                f"give {check.wanted}",
            )
    return {name: value for name, value in inputs.items() if value is not None}


@dataclass(frozen=True)
class _Check:
    wanted: str
    holds: Callable[[Any], bool]
    schema: Mapping[str, Any]


def _integer(low: int, high: int | None = None) -> _Check:
    top = f" to {high}" if high else " or more"
    schema = {"type": "integer", "minimum": low} | ({"maximum": high} if high else {})
    return _Check(
        f"a whole number, {low}{top}",
        lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v and (high is None or v <= high),
        schema,
    )


def _text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and value != [] and all(isinstance(v, str) for v in value))


_TEXT = _Check(
    "text in quotes, or a list of texts",
    _text,
    {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]},
)
_NUMBER = _Check("a number", lambda v: isinstance(v, int | float) and not isinstance(v, bool), {"type": "number"})
# Everything else goes to pipe(...) as it is and is checked against the pipeline's own signature.
INPUTS: dict[str, _Check] = {
    "prompt": _TEXT,
    "negative_prompt": _TEXT,
    "num_inference_steps": _integer(1),
    "seed": _integer(0, MAX_SEED),
    "height": _integer(1),
    "width": _integer(1),
    "num_frames": _integer(1),
    "guidance_scale": _NUMBER,
}


def _output(document: Document) -> Path | None:
    output = document.data.get("output")
    if output is None:
        return None
    where = document.where(("output",))
    if not isinstance(output, str) or not output.strip() or "\0" in output:
        raise RecipeFileError(f"output is {_kind(output)}", where, "give a path, for instance `out/result.mp4`")
    path = Path(output).expanduser()
    folder = output.endswith(("/", os.sep)) or path.is_dir() or not path.suffix
    if not folder and path.suffix.lower() not in SUFFIXES:
        raise RecipeFileError(
            f"cannot write {path.suffix} files", where, f"end with one of {', '.join(SUFFIXES)}, or with / for a folder"
        )
    return path if not folder else Path(f"{path}") / ""


def _compare(document: Document) -> bool:
    value = document.data.get("compare")
    if value is None or value is False:
        return False
    if value != "dense":
        raise RecipeFileError(
            f"cannot compare with {value!r}",
            document.where(("compare",)),
            "write `compare: dense` or leave it out; two recipes are compared by `patchkit compare A B`",
        )
    return True


def _one_of(document: Document, path: Keys, known: Sequence[str]) -> None:
    value = document.data[path[0]].get(path[1])
    if value is not None and value not in known:
        raise RecipeFileError(f"{value!r} is no {path[1]}", document.where(path), nearest(value, known))


def _known_keys(document: Document, path: Keys, known: Sequence[str]) -> None:
    here = document.data
    for part in path:
        here = here[part]
    for key in here:
        if key not in known:
            raise RecipeFileError(f"there is no field {key!r}", document.where((*path, key)), nearest(key, known))


def _kind(value: Any) -> str:
    if value is None:
        return "empty"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "a mapping"}
    return names.get(type(value), type(value).__name__)
