"""Which arguments of a pipeline call are the recipes' own."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from patchkit.bound import Bound


def split(
    pipeline: type, runners: Sequence[Bound], kwargs: dict[str, Any]
) -> tuple[dict[int, dict[str, Any]], dict[str, Any]]:
    """The arguments of each recipe by the ``id`` of its bound, and those that go to the pipeline."""
    rest = dict(kwargs)
    options: dict[int, dict[str, Any]] = {}
    own = inspect.signature(pipeline.__call__).parameters  # type: ignore[operator]
    for bound in runners:
        mine = {name: kwargs[name] for name in bound.recipe.arguments if name in kwargs}
        options[id(bound)] = mine
        for name in mine:
            if name not in own:
                rest.pop(name, None)
    return options, rest


def unknown(pipeline: type, kwargs: dict[str, Any]) -> bool:
    """Whether the pipeline will refuse one of these arguments."""
    own = inspect.signature(pipeline.__call__).parameters  # type: ignore[operator]
    if any(p.kind is p.VAR_KEYWORD for p in own.values()):
        return False
    return any(name not in own for name in kwargs)
