"""Verbs that belong to recipes: searches, calibrations and trainings, which the command line offers as commands.

Whoever writes a recipe may give it a *job*: ``patchkit VERB FILE`` then loads the model that the recipe file names,
reads the file's section of the verb's name, and calls the job. A verb of two words, ``calibrate.var``, is the command
``patchkit calibrate var FILE`` and the section ``calibrate: {var: {...}}``. Packages offer theirs through the
entry-point group ``patchkit.jobs``; patchkit's own are listed in ``jobs.json`` beside its recipes, so that the command
line can name all of them without importing any.
"""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchkit.errors import PatchkitError, nearest
from patchkit.text import duration

if TYPE_CHECKING:
    from pydantic import BaseModel

    from patchkit.recipe_base import Recipe

logger = logging.getLogger(__name__)

GROUP = "patchkit.jobs"  # entry-point group; the name is the verb, the value names a Job


@dataclass(frozen=True)
class JobProgress:
    """How far a job is; ``left`` are the seconds that it will still take, None before that can be told."""

    done: int
    total: int
    what: str = ""
    left: float | None = None

    def __str__(self) -> str:
        left = "" if self.left is None else f", about {duration(self.left)} left"
        return f"{self.done} of {self.total}" + (f": {self.what}" if self.what else "") + left


@dataclass(frozen=True)
class JobCall:
    """What a job is called with; everything in it has been checked.

    Attributes:
        target: the loaded pipeline or model, unpatched; None while the request is only checked.
        tokenizer: of a language model, else None.
        model: how the recipe file names the model.
        recipes: those of the recipe file.
        inputs: its inputs over those that the model is best called with.
        options: the verb's section, an instance of the job's ``options``.
        loaded_as: how it is loaded besides, as the file says it: ``dtype``, ``revision``, ``variant``.
        output: the path under ``output``, None if the file names none.
        in_folder: whether that is a folder: a path with ``/`` at its end, or without a suffix.
        device: where the target computes.
        say: tells what is being done, one line each.
        progress: tells how far it is; call it often, it is shown now and then.
        encode: of a language model: ``encode(prompt, pictures)`` is what the model is called with to read a prompt,
            after pictures if it reads such; else None.
        reads_pictures: whether it does.
        where: place of a field of the section (or of nothing: of the section) in the file, for messages.
    """

    target: Any
    tokenizer: Any
    model: str
    recipes: tuple[Recipe, ...]
    inputs: Mapping[str, Any]
    options: Any
    output: Path | None
    device: str
    say: Callable[[str], None]
    progress: Callable[[JobProgress], None]
    encode: Callable[..., Any] | None = None
    reads_pictures: bool = False
    loaded_as: Mapping[str, str] = field(default_factory=dict)
    in_folder: bool = False
    where: Callable[..., str] = lambda *path: ".".join(path)


@dataclass(frozen=True)
class JobResult:
    """What a job made.

    Attributes:
        files: label -> file that was written.
        data: figures, for machines.
        text: the same in words.
        notes: what the reader should know besides.
    """

    files: Mapping[str, Path] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**self.data, "files": {n: str(p) for n, p in self.files.items()}, "notes": list(self.notes)}


@dataclass(frozen=True)
class Job:
    """A verb's code.

    Long ones write what is finished as they go (:func:`patchkit.media.replacing` replaces a file in one step), so that
    the same command goes on after whatever stopped it; Ctrl-C reaches ``run`` as ``KeyboardInterrupt``.

    Args:
        help: what it does, for ``patchkit VERB --help``.
        options: pydantic model of the section; forbid unknown fields in it (``extra="forbid"``).
        run: does it. Raise :class:`PatchkitError` for what cannot be done.
        check: refuses what can be known to be wrong before the model is loaded: it gets the same call without target,
            tokenizer and ``encode``.
    """

    help: str
    options: type[BaseModel]
    run: Callable[[JobCall], JobResult]
    check: Callable[[JobCall], None] = lambda call: None


@dataclass(frozen=True)
class Verb:
    """A job that is known by name, imported or not.

    ``model`` is "text" where it works on language models alone, so that its command shows no flags for pictures.
    """

    name: str
    value: str  # "module:attribute"
    help: str
    model: str = "any"

    @property
    def path(self) -> tuple[str, ...]:
        """``("calibrate", "var")``: words of the command, and keys of the section."""
        return tuple(self.name.split("."))

    def load(self) -> Job:
        """Import the job; raises :class:`PatchkitError` if that fails."""
        module, _, name = self.value.partition(":")
        try:
            found = getattr(importlib.import_module(module), name)
        except Exception as error:  # somebody else's code, at import
            raise PatchkitError(
                f"the verb {self.name!r} cannot be loaded: {type(error).__name__}: {error}",
                self.value,
                "reinstall or remove the package that it comes from",
            ) from error
        if not isinstance(found, Job):
            raise PatchkitError(f"the verb {self.name!r} is no Job", self.value, "name a patchkit.jobs.Job")
        return found


@cache
def verbs() -> dict[str, Verb]:
    """Every verb by name; imports none of them."""
    found: dict[str, Verb] = {}
    shipped = files("patchkit.recipes") / "jobs.json"
    own = json.loads(shipped.read_text(encoding="utf-8")) if shipped.is_file() else {}
    for name, entry in own.items():
        found[name] = Verb(name, entry["job"], entry["help"], entry.get("for", "any"))
    for point in entry_points(group=GROUP):
        if point.name in found or not all(part.isidentifier() for part in point.name.split(".")):
            logger.warning("verb %r (%s) has no usable name of its own and is left out", point.name, point.value)
            continue
        package = point.dist.name if point.dist is not None else point.value
        found[point.name] = Verb(point.name, point.value, f"A verb of {package}.")
    return dict(sorted(found.items()))


def get(name: str) -> Verb:
    """The verb of that name; raises :class:`PatchkitError` naming the nearest."""
    known = verbs()
    if name not in known:
        raise PatchkitError(f"there is no verb {name!r}", remedy=nearest(name, known))
    return known[name]
