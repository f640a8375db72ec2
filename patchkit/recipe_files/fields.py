"""The fields of a recipe file other than its recipes: model, inputs, output, compare."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchkit.errors import RecipeFileError, nearest
from patchkit.recipe_files.yamlread import Document, Keys

MODEL_FIELDS = ("id", "dtype", "device", "offload", "revision", "variant")
DTYPES = ("auto", "float16", "fp16", "bfloat16", "bf16", "float32", "fp32")  # as diffusers-cli
OFFLOADS = ("none", "model", "sequential")
VIDEO_SUFFIXES = (".mp4", ".gif")
TEXT_SUFFIXES = (".txt", ".json")
RECIPE_SUFFIXES = (".yaml", ".yml")  # what a verb finds may be a recipe file; no run can be written as one
SUFFIXES = (*VIDEO_SUFFIXES, ".png", *TEXT_SUFFIXES, *RECIPE_SUFFIXES)
MAX_SEED = 2**63 - 1

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DEVICE = re.compile(r"(cpu|cuda|mps|xpu|hpu|npu)(:\d+)?")


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

    def chosen(self) -> dict[str, str]:
        """What makes it this model and no other besides ``id``, where it is given: not where it computes."""
        given = {"dtype": self.dtype, "revision": self.revision, "variant": self.variant}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class Output:
    """Where results go: one file, or a folder for several (a path that ends with a slash or has no suffix)."""

    path: Path
    folder: bool

    @property
    def suffix(self) -> str:
        """``.mp4`` and so on; empty for a folder."""
        return "" if self.folder else self.path.suffix.lower()


def model(document: Document) -> ModelSpec:
    """Read ``model``: a string, or a mapping with ``id``."""
    data = document.data["model"]
    if isinstance(data, str):
        return ModelSpec(_model_id(document, ("model",), data))
    if not isinstance(data, dict):
        raise RecipeFileError(
            f"model is {kind(data)}",
            document.where(("model",)),
            "give zoo/NAME, a folder, a hub id, or `{id: ..., dtype: ...}`",
        )
    known_keys(document, ("model",), MODEL_FIELDS)
    for name, value in data.items():
        if value is not None and not isinstance(value, str):
            hint = f'write it as text: `{name}: "{value}"`' if isinstance(value, int | float) else "give text"
            raise RecipeFileError(f"{name} is {kind(value)}", document.where(("model", name)), hint)
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


def inputs(document: Document) -> dict[str, Any]:
    """Read ``inputs``; arguments unknown here are checked later against the pipeline's signature."""
    given = document.data.get("inputs")
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise RecipeFileError(
            f"inputs is {kind(given)}", document.where(("inputs",)), 'write a mapping: `inputs: {prompt: "..."}`'
        )
    for name, value in given.items():
        check = INPUTS.get(name)
        if check and value is not None and not check.holds(value):
            raise RecipeFileError(
                f"{name} is {value!r}" if isinstance(value, str | int | float) else f"{name} is {kind(value)}",
                document.where(("inputs", name)),
                f"give {check.wanted}",
            )
    return {name: value for name, value in given.items() if value is not None}


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
    return isinstance(value, str) or (
        isinstance(value, list) and value != [] and all(isinstance(v, str) for v in value)
    )


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


def output(document: Document) -> Output | None:
    """Read ``output``."""
    value = document.data.get("output")
    if value is None:
        return None
    where = document.where(("output",))
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise RecipeFileError(f"output is {kind(value)}", where, "give a path, for instance `out/result.mp4`")
    path = Path(value).expanduser()
    folder = value.endswith(("/", os.sep)) or path.is_dir() or not path.suffix
    if not folder and path.suffix.lower() not in SUFFIXES:
        raise RecipeFileError(
            f"cannot write {path.suffix} files", where, f"end with one of {', '.join(SUFFIXES)}, or with / for a folder"
        )
    return Output(path, folder)


def compare(document: Document) -> bool:
    """Read ``compare``: ``dense`` or nothing."""
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


def known_keys(document: Document, path: Keys, known: Sequence[str]) -> None:
    """Refuse keys that nobody knows, naming the nearest."""
    here = document.data
    for part in path:
        here = here[part]
    for key in here:
        if key not in known:
            raise RecipeFileError(f"there is no field {key!r}", document.where((*path, key)), nearest(key, known))


def kind(value: Any) -> str:
    """What a value is, in a reader's words."""
    if value is None:
        return "empty"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "a mapping"}
    return names.get(type(value), type(value).__name__)
