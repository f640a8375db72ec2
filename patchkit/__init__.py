"""patchkit: training-free methods for diffusers and transformers models that are already loaded.

    patch = patchkit.apply(pipe, "adaspa")   # one line on
    video = pipe("a red circle moving right on a blue background")
    patch.remove()                           # one line off, exactly

Importing this package imports none of the libraries and changes nothing in them. Where peft is imported, before or
after, it learns of the adapters that recipes bring (:mod:`patchkit.waiting`).
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

_here = Path(__file__).resolve().parent
if not (_here / "recipes").is_dir() and (_here.parent / "recipes").is_dir():
    __path__.append(str(_here.parent))  # a plain checkout: the folders beside this one are our subpackages

from patchkit import waiting  # noqa: E402  behind the lines that make a plain checkout a package

if TYPE_CHECKING:
    from patchkit import zoo
    from patchkit.api import apply, plan, remove, status
    from patchkit.errors import (
        Conflict,
        Drift,
        InvalidOption,
        MissingDependency,
        NothingMatched,
        PatchkitError,
        RecipeFileError,
        UnknownRecipe,
        UnsupportedModel,
    )
    from patchkit.patch import Patch
    from patchkit.planning import Plan
    from patchkit.recipe_base import Recipe
    from patchkit.registry import recipe
    from patchkit.report import Report

__version__ = "0.1.0"

_ERRORS = (
    "Conflict",
    "Drift",
    "InvalidOption",
    "MissingDependency",
    "NothingMatched",
    "PatchkitError",
    "RecipeFileError",
    "UnknownRecipe",
    "UnsupportedModel",
)
_HOMES = {
    **dict.fromkeys(("apply", "plan", "remove", "status"), "patchkit.api"),
    **dict.fromkeys(_ERRORS, "patchkit.errors"),
    "Patch": "patchkit.patch",
    "Plan": "patchkit.planning",
    "Recipe": "patchkit.recipe_base",
    "recipe": "patchkit.registry",
    "Report": "patchkit.report",
}

__all__ = [
    "Conflict",
    "Drift",
    "InvalidOption",
    "MissingDependency",
    "NothingMatched",
    "Patch",
    "PatchkitError",
    "Plan",
    "Recipe",
    "RecipeFileError",
    "Report",
    "UnknownRecipe",
    "UnsupportedModel",
    "__version__",
    "apply",
    "plan",
    "recipe",
    "recipes",
    "remove",
    "status",
    "zoo",
]


waiting.wait()


def __getattr__(name: str) -> Any:
    if name in ("recipes", "zoo"):  # recipes is a package that can be called
        return importlib.import_module(f"patchkit.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'patchkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
