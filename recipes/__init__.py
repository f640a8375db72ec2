"""The recipes: one file a method. Calling the package, ``patchkit.recipes()``, lists every known recipe by name."""

from __future__ import annotations

import sys
import types
from typing import Any


class _Recipes(types.ModuleType):
    """Lets this package be both the place where recipes live and the function that lists them."""

    def __call__(self) -> dict[str, Any]:
        from patchkit.registry import all_recipes

        return all_recipes()


sys.modules[__name__].__class__ = _Recipes
