"""Which prompts are run, with which seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from patchkit.errors import InvalidOption, RecipeFileError, nearest
from patchkit.recipe_files.files import RecipeFile
from patchkit.runs.calls import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from patchkit.zoo.worlds import World

APART = 1000  # seeds of two prompts lie this far apart, so that no two samples start from the same noise
_FIELDS = ("prompt", "seed", "inputs", "source", "mask")


@dataclass(frozen=True)
class Case:
    """One prompt.

    Attributes:
        number: its place in the set, from 0.
        prompt: the text.
        inputs: further inputs of the call that this prompt brings with it.
        source: what an edit starts from; results are compared with it outside ``mask``.
        mask: a picture that is bright where an edit may change things.
        first_seed: of its samples; None = from the seed of the run and ``number``.
    """

    number: int
    prompt: str
    inputs: Mapping[str, Any] = field(default_factory=dict)
    source: Path | None = None
    mask: Path | None = None
    first_seed: int | None = None

    def seed(self, base: int, repeat: int) -> int:
        """The seed of one sample of this prompt."""
        return (base + APART * self.number if self.first_seed is None else self.first_seed) + repeat


def choose(wanted: str | None, file: RecipeFile, world: World | None) -> list[Case]:
    """The prompts of a run.

    Args:
        wanted: a number (so many of the world's fixed set), a file, or None: the prompt of the recipe file.
        file: the recipe file that model and inputs are taken from.
        world: of the model, or None.
    """
    if wanted is None:
        return _own(file, world)
    if wanted.strip().lstrip("+-").isdecimal():
        return _of_world(int(wanted), file, world)
    return read(Path(wanted).expanduser())


def _own(file: RecipeFile, world: World | None) -> list[Case]:
    given = file.inputs.get("prompt")
    if not given and world is not None:
        return _of_world(1, file, world)
    file.require(output=False)
    texts = [given] if isinstance(given, str) else list(given or ())
    return [Case(n, text) for n, text in enumerate(texts)]


def _of_world(count: int, file: RecipeFile, world: World | None) -> list[Case]:
    if world is None:
        name = file.model.id if file.model else "the model"
        raise InvalidOption(
            f"{name} has no world of its own, so there is no fixed set of prompts for it",
            f"--prompts {count}",
            "give a file with one prompt a line: --prompts prompts.txt",
        )
    if not 1 <= count <= world.size:
        raise InvalidOption(
            f"{count} prompts were asked for", "--prompts", f"the {world.name} give 1 to {world.size} different ones"
        )
    return [Case(n, text) for n, text in enumerate(world.prompts(count))]


def read(path: Path) -> list[Case]:
    """Prompts from a file: one a line, or (``.jsonl``) one JSON object a line.

    Empty lines count nowhere, and in a text file neither do lines that start with ``#``.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise InvalidOption(
            f"there is no file {path}", "--prompts", "give a number, or a file with one prompt a line"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidOption(f"cannot read {path}: {error}", "--prompts", "give a text file in UTF-8") from None
    structured = path.suffix.lower() in (".jsonl", ".json")
    cases: list[Case] = []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if text and (structured or not text.startswith("#")):
            where = f"{path}:{number}"
            cases.append(_entry(text, len(cases), where, path.parent) if structured else Case(len(cases), text))
            _refuse_repeated(cases, where)
    if not cases:
        raise InvalidOption(f"{path} holds no prompt", "--prompts", "write one prompt a line")
    return cases


def _refuse_repeated(cases: list[Case], where: str) -> None:
    *others, last = cases
    if any(c.prompt == last.prompt and c.inputs == last.inputs and c.source == last.source for c in others):
        raise InvalidOption(f"the prompt {last.prompt!r} is there twice", where, "for more samples of it use --seeds")


def _entry(text: str, number: int, where: str, folder: Path) -> Case:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise RecipeFileError(f"this line is not JSON: {error}", where, 'write {"prompt": "..."}') from None
    if not isinstance(data, dict) or not isinstance(data.get("prompt"), str) or not data["prompt"].strip():
        raise RecipeFileError("this line has no prompt", where, 'write {"prompt": "..."}')
    for name in data:
        if name not in _FIELDS:
            raise RecipeFileError(f"there is no field {name!r}", where, nearest(name, _FIELDS))
    inputs, seed = data.get("inputs", {}), data.get("seed")
    if not isinstance(inputs, dict):
        raise RecipeFileError("inputs is no mapping", where, 'write "inputs": {"name": value}')
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
        raise RecipeFileError(f"seed is {seed!r}", where, "give a whole number, 0 or more")
    paths = {name: _path(data[name], name, where, folder) for name in ("source", "mask") if data.get(name) is not None}
    return Case(number, data["prompt"], inputs, first_seed=seed, **paths)


def _path(value: Any, name: str, where: str, folder: Path) -> Path:
    """Paths are relative to the file, as it travels with its pictures."""
    path = folder / Path(value).expanduser() if isinstance(value, str) else None
    known = IMAGE_SUFFIXES if name == "mask" else (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)
    if path is None or path.suffix.lower() not in known or not path.is_file():
        raise RecipeFileError(
            f"{name} is {value!r}, which is no file that is there",
            where,
            f"give a path that ends in {', '.join(known)}",
        )
    return path
