"""Reads small YAML documents into plain values while remembering on which line each of them stands.

PyYAML's own loaders forget the lines, take the last of two equal keys without a word, follow references and build
objects from tags. Recipe files need none of that, so references, tags and repeated keys are errors here. Scalars follow
the YAML 1.2 core schema, in which ``no`` is a word and ``1e-3`` a number.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from patchkit.errors import RecipeFileError

MAX_BYTES = 256 * 1024  # a recipe file has some hundred bytes; anything this large is something else
MAX_DEPTH = 20  # deeper nesting is an attack on the parser's recursion, not a recipe

Keys = tuple[str | int, ...]

_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_NULL = {"", "~", "null", "Null", "NULL"}
_INT = re.compile(r"[-+]?[0-9]+")
_HEX = re.compile(r"0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = {".inf": math.inf, "+.inf": math.inf, "-.inf": -math.inf, ".nan": math.nan}


@dataclass
class Document:
    """Plain values, and where each of them stands.

    Attributes:
        data: dicts, lists and scalars.
        source: name of the file, for messages.
        places: for each path into ``data`` the place to name in a message, such as ``circle.yaml:7``.
    """

    data: Any
    source: str
    places: dict[Keys, str] = field(default_factory=dict)

    def where(self, path: Keys = ()) -> str:
        """``file:line, field 'recipes[0].adaspa.density'``; the line of the nearest enclosing value if need be."""
        place = self.source
        for length in range(len(path), -1, -1):
            if path[:length] in self.places:
                place = self.places[path[:length]]
                break
        return f"{place}, field {dotted(path)!r}" if path else place

    def put(self, path: Keys, value: Any, place: str) -> None:
        """Set a value (making mappings on the way) that came from ``place``, for instance a command-line option."""
        here = self.data
        for key in path[:-1]:
            if isinstance(here, dict) and not isinstance(here.get(key), dict | list):
                here[key] = {}
            here = here[key]
        here[path[-1]] = value
        for known in [p for p in self.places if p[: len(path)] == path]:
            del self.places[known]
        self.places[path] = place


def dotted(path: Keys) -> str:
    """``("recipes", 0, "adaspa")`` as ``recipes[0].adaspa``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else (f".{part}" if text else str(part))
    return text


def read_file(path: str | Path) -> Document:
    """Read a YAML file; raises :class:`RecipeFileError` for whatever cannot be one."""
    path = Path(path).expanduser()
    name = str(path)
    if path.is_dir():
        raise RecipeFileError(f"{name} is a directory", name, "give the recipe file itself, for instance circle.yaml")
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        remedy = "check the path; it is relative to the current folder"
        raise RecipeFileError(f"there is no file {name}", name, remedy) from None
    except OSError as error:
        raise RecipeFileError(f"cannot read {name}: {error.strerror or error}", name, "check its permissions") from None
    if len(raw) > MAX_BYTES:
        raise RecipeFileError(
            f"{name} is too large for a recipe file (over {MAX_BYTES // 1024} KiB)", name, "is this the right file?"
        )
    if b"\0" in raw:
        raise RecipeFileError(f"{name} is a binary file", name, "give a YAML text file")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise RecipeFileError("the file is not UTF-8 text", f"{name}:{line}", "save it as UTF-8") from None
    return read_text(text, name)


def read_text(text: str, source: str) -> Document:
    """Read YAML text; ``source`` is its name in messages."""
    document = Document(None, source)
    _refuse_surprises(text, source)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise _malformed(error, source) from None
    if node is None:
        raise RecipeFileError("the file is empty", source, "see `patchkit schema`, or `patchkit info RECIPE`")
    document.data = _construct(node, (), document)
    return document


def read_value(text: str, source: str) -> Any:
    """Read one YAML value such as ``0.2``, ``[0.2, 1.0]`` or ``5-``; what is no YAML is taken as text."""
    try:
        return read_text(text, source).data if text.strip() else text
    except RecipeFileError:
        return text


def _refuse_surprises(text: str, source: str) -> None:
    """Look at the flat event stream first: nothing has been expanded or nested in memory at that point."""
    depth = documents = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            place = f"{source}:{event.start_mark.line + 1}" if event.start_mark else source
            anchor, tag = getattr(event, "anchor", None), getattr(event, "tag", None)
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise RecipeFileError("a second document starts here", place, "one recipe file, one document")
            if anchor:
                raise RecipeFileError(
                    f"references (&{anchor}, *{anchor}) are not allowed", place, "write the value out"
                )
            if tag:
                raise RecipeFileError(f"the tag {tag!r} is not allowed", place, "leave the tag out")
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            if depth > MAX_DEPTH:
                raise RecipeFileError("values are nested too deeply", place, "a recipe file needs four levels or so")
    except yaml.YAMLError as error:
        raise _malformed(error, source) from None


def _malformed(error: yaml.YAMLError, source: str) -> RecipeFileError:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    place = f"{source}:{mark.line + 1}, column {mark.column + 1}" if mark else source
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "cannot be read"
    problem = problem.replace("\t", "\\t")
    remedy = "check indentation, colons and quotes around here"
    if "'\\t'" in problem:
        problem, remedy = "a tab stands where YAML wants spaces", "indent with spaces"
    return RecipeFileError(f"this is not YAML: {problem}", place, remedy)


def _construct(node: yaml.Node, path: Keys, document: Document) -> Any:
    line = node.start_mark.line + 1
    document.places.setdefault(path, f"{document.source}:{line}")
    if isinstance(node, yaml.ScalarNode):
        return node.value if node.style else scalar(node.value)
    if isinstance(node, yaml.SequenceNode):
        return [_construct(item, (*path, i), document) for i, item in enumerate(node.value)]
    out: dict[str, Any] = {}
    for key_node, value_node in node.value:
        place = f"{document.source}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise RecipeFileError("a key must be a plain word", place, "write `key: value`")
        key = key_node.value
        if key in out:
            raise RecipeFileError(
                f"the key {key!r} stands here a second time (first: {document.places[(*path, key)]})",
                f"{place}, field {dotted((*path, key))!r}",
                "keep one of them",
            )
        document.places[(*path, key)] = place  # of the key: the value may start on a later line
        out[key] = _construct(value_node, (*path, key), document)
    return out


def scalar(text: str) -> Any:
    """The value of an unquoted scalar."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.fullmatch(text):
        return int(text) if len(text) < 40 else text
    if _HEX.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    return _SPECIAL.get(text.lower(), text)
