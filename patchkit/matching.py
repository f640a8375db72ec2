"""Which sites a recipe takes, and why it leaves the others."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from patchkit.adapters.base import Adapter
from patchkit.errors import InvalidOption, NothingMatched, UnsupportedModel
from patchkit.installation import Installation
from patchkit.recipe_base import Recipe
from patchkit.selection import Indices, matches
from patchkit.sites import Site


@dataclass(frozen=True)
class Selection:
    """Which sites one recipe takes, and why it leaves the others."""

    recipe: Recipe
    matched: list[Site]
    left: list[tuple[Site, str]]
    prepared: Any = None  # what the recipe found when it looked at the model

    def reasons(self) -> dict[str, int]:
        """How many sites are left for each reason."""
        return dict(Counter(reason for _, reason in self.left))


def select(recipe: Recipe, installation: Installation) -> Selection:
    """Which sites a recipe takes; raises :class:`NothingMatched` or :class:`UnsupportedModel`."""
    adapter = installation.adapter
    where = f"recipe {recipe.name!r} on {adapter.name}"
    _check_fit(recipe, adapter, where)
    layers = Indices.parse(recipe.layers, f"{where}, option 'layers'")
    counts = {s.component: s.layers for s in installation.sites}
    _check_range(layers, max(counts.values(), default=0), f"{where}, option 'layers'", "blocks")
    heads = recipe.head_numbers(f"{where}, option 'heads'")
    _check_range(heads, max((s.heads for s in installation.sites), default=0), f"{where}, option 'heads'", "heads")
    chosen = {component: layers.resolve(count) for component, count in counts.items()}
    matched, left = [], []
    for site in installation.sites:
        reason = _why_not(recipe, site, chosen)
        if reason is None:
            matched.append(site)
        else:
            left.append((site, reason))
    selection = Selection(recipe, matched, left)
    if not matched and (recipe.wraps("attend") or recipe.selects()):
        reasons = "; ".join(f"{count} x {reason}" for reason, count in selection.reasons().items())
        raise NothingMatched(
            f"no attention site is left to patch ({reasons or 'the model has none'})",
            where,
            "widen layers, targets or exclude; patchkit.plan names each site and why it is left",
        )
    return selection


def _check_fit(recipe: Recipe, adapter: Adapter, where: str) -> None:
    if adapter.family not in recipe.families:
        raise UnsupportedModel(
            f"this recipe is for {' and '.join(recipe.families)} models, not for {adapter.family}",
            where,
            "patchkit.recipes() lists what each recipe is for",
        )
    if recipe.wraps("run") and not adapter.is_pipeline:
        raise UnsupportedModel("this recipe works on whole pipeline runs", where, "give the pipeline, not its model")
    if adapter.family == "transformers" and recipe.steps and any(isinstance(s, float) for s in recipe.steps):
        raise InvalidOption(
            "a language model's run has no known length, so fractions of it mean nothing",
            f"{where}, option 'steps'",
            "give step numbers: 0 is the prefill, then one a token",
        )


def _check_range(indices: Indices, count: int, where: str, what: str) -> None:
    beyond = indices.beyond(count)
    if beyond and count:
        raise InvalidOption(f"{', '.join(beyond)} selects none of the {count} {what}", where, f"0 to {count - 1}")


def _why_not(recipe: Recipe, site: Site, chosen: dict[str, frozenset[int]]) -> str | None:
    if site.unsupported:
        return site.unsupported
    if site.kind not in recipe.kinds:
        return f"{site.kind} attention (the recipe works on {', '.join(recipe.kinds)})"
    names = (site.name, site.full_name)
    if recipe.targets is not None and not any(matches(n, recipe.targets) for n in names):
        return "not in targets"
    if any(matches(n, recipe.exclude) for n in names):
        return "excluded"
    if site.layer not in chosen[site.component]:
        return "layer not selected"
    return recipe.accepts(site)
