"""Every error that patchkit raises on purpose. Each says what is wrong, where, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PatchkitError(Exception):
    """Base of all of them.

    Args:
        what: what is wrong, in one sentence.
        where: pipeline, site, file and line, or field; empty when the call itself is the place.
        remedy: what the reader can do.
    """

    def __init__(self, what: str, where: str = "", remedy: str = "") -> None:
        self.what, self.where, self.remedy = what, where, remedy
        super().__init__(self.__str__())

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.remedy:
            lines.append(f"  do:    {self.remedy}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.what, self.where, self.remedy)


class UnknownRecipe(PatchkitError, LookupError):
    """No recipe of that name is registered."""


class InvalidOption(PatchkitError, ValueError):
    """An option that the recipe does not have, or a value it cannot take."""


class UnsupportedModel(PatchkitError, TypeError):
    """The object is no pipeline or model that patchkit (or this recipe) can work on."""


class NothingMatched(PatchkitError, LookupError):
    """A selection that leaves nothing to patch."""


class Conflict(PatchkitError):
    """Two recipes, or a recipe and something attached by others, that cannot work together."""


class Drift(PatchkitError):
    """Something that patchkit had installed was replaced by others meanwhile."""


class RecipeFileError(PatchkitError, ValueError):
    """A recipe file that cannot be read or says something impossible."""


class MissingDependency(PatchkitError, ImportError):
    """An optional package that this call needs."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A remedy line for a mistyped name: the nearest known one first, then all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    listing = ", ".join(known) or "none"
    return f"did you mean {close[0]!r}? known: {listing}" if close else f"known: {listing}"
