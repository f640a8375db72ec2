"""Variants that differ in one number: what a curve can be drawn over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LEAST = 3  # variants, for a curve


def sweep(variants: Mapping[str, Any]) -> tuple[str, dict[str, float]] | None:
    """The one option in which all variants with recipes differ, and its value in each of them.

    None if there are fewer than three such variants, or they differ in more, in nothing, or in something that is no
    number.

    Args:
        variants: name -> ``{"recipes": [{"name": ..., "options": {...}}, ...]}``; those without recipes are left out.
    """
    settings = {name: _flat(v["recipes"]) for name, v in variants.items() if v["recipes"]}
    if len(settings) < LEAST:
        return None
    first, *others = settings.values()
    if any(set(other) != set(first) for other in others):
        return None
    differing = [key for key in first if any(other[key] != first[key] for other in others)]
    if len(differing) != 1:
        return None
    values = {name: setting[differing[0]] for name, setting in settings.items()}
    if any(isinstance(v, bool) or not isinstance(v, int | float) for v in values.values()):
        return None
    return differing[0][1], values


def _flat(recipes: list[Mapping[str, Any]]) -> dict[tuple[str, str], Any]:
    """(recipe, option) -> value; the recipes themselves stand for options, so that other recipes differ."""
    found: dict[tuple[str, str], Any] = {}
    for number, recipe in enumerate(recipes):
        found[f"{number} {recipe['name']}", ""] = None
        found |= {(f"{number} {recipe['name']}", option): value for option, value in recipe["options"].items()}
    return found
