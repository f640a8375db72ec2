"""The functions of ``import patchkit``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from patchkit import registry
from patchkit.adapters import adapter_for
from patchkit.adapters.base import Adapter
from patchkit.drift import drift
from patchkit.errors import Conflict, InvalidOption, UnknownRecipe
from patchkit.installation import Installation, find
from patchkit.patch import Patch
from patchkit.planning import Plan, make_plan
from patchkit.recipe_base import Recipe

Spec = str | Path | Recipe | Sequence["str | Recipe"]


def apply(target: Any, spec: Spec, **options: Any) -> Patch:
    """Patch a loaded pipeline or model.

    Args:
        target: a diffusers pipeline or denoiser, or a transformers model, already loaded.
        spec: a recipe's name, a :class:`Recipe`, a list of them, or the path of a recipe file.
        options: options of the recipe, when ``spec`` is one name.

    Returns:
        The handle: ``remove()``, ``disable()``, ``enable()``, ``report()``, ``save(path)``; or use it in ``with``.

    Raises:
        UnknownRecipe, InvalidOption, RecipeFileError: the request is wrong.
        UnsupportedModel, NothingMatched, Conflict: it does not fit this target. Nothing has been changed then.
    """
    return make_plan(target, resolve(spec, options), find(target), 50, None).carry_out()


def plan(target: Any, spec: Spec, *, steps: Any = 50, tokens: int | None = None, **options: Any) -> Plan:
    """What :func:`apply` would do: sites and reasons, order, conflicts, predicted cost. Changes nothing.

    Args:
        target: as for :func:`apply`.
        spec: as for :func:`apply`.
        steps: number of denoising steps to predict for. A pair is the recipe's own option, as for :func:`apply`.
        tokens: sequence length to predict for; default: the model's own default size.
        options: as for :func:`apply`.
    """
    if not isinstance(steps, int):
        options["steps"], steps = steps, 50
    return make_plan(target, resolve(spec, options), find(target), steps, tokens)


def status(target: Any) -> dict[str, Any]:
    """What patchkit has on ``target``: recipes, sites, drift, and what others have attached."""
    installation = find(target)
    adapter = installation.adapter if installation else adapter_for(target)
    return {
        "target": adapter.name,
        "patched": installation is not None,
        "part_of": _whole(target, adapter),
        "recipes": [
            {
                "recipe": b.recipe.name,
                "options": b.recipe.options(),
                "enabled": b.enabled,
                "sites": [s.full_name for s in b.sites],
            }
            for b in (installation.order() if installation else ())
        ],
        "drift": drift(installation) if installation else [],
        "foreign": adapter.foreign(),
    }


def remove(target: Any) -> list[str]:
    """Remove every patch from ``target``. Returns what had drifted; a target without patches is left alone."""
    installation = find(target)
    if installation is None:
        whole = _whole(target, adapter_for(target))
        if whole:
            raise Conflict(
                f"this {type(target).__name__} is patched as a part of a {whole}", remedy="remove the patch from that"
            )
        return []
    drift: list[str] = []
    for owner in dict.fromkeys(b.owner for b in installation.bound):
        assert isinstance(owner, Patch)
        drift += owner.remove()
    return drift


def _whole(target: Any, adapter: Adapter) -> str | None:
    """What ``target`` was patched as a part of, where it is not patched itself."""
    for part in (target, adapter.target):
        found = Installation.around(part)
        if found is not None and not found.holds(part):
            return found.adapter.name
    return None


def resolve(spec: Spec, options: dict[str, Any]) -> list[Recipe]:
    """Recipes from what a user may write."""
    if isinstance(spec, Recipe):
        _no_options(options, "the Recipe itself carries its options")
        return [spec]
    if isinstance(spec, Path) or (isinstance(spec, str) and spec.endswith((".yaml", ".yml"))):
        from patchkit.recipe_files.files import load_recipes

        _no_options(options, "the file says the options")
        return load_recipes(Path(spec))
    if isinstance(spec, str):
        return [registry.get(spec).build(options)]
    if isinstance(spec, Sequence):
        if not spec:
            raise UnknownRecipe("the list of recipes is empty", remedy="name at least one")
        _no_options(options, "with several recipes, give Recipe objects that carry their options")
        return [r for part in spec for r in resolve(part, {})]
    raise UnknownRecipe(
        f"a {type(spec).__name__} names no recipe", remedy="give a name, a Recipe, a list of them or a recipe file"
    )


def _no_options(options: dict[str, Any], why: str) -> None:
    if options:
        raise InvalidOption(f"options {', '.join(sorted(options))} are out of place", remedy=why)
