"""What applying would do, worked out before anything is changed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from patchkit.adapters.base import Adapter, unwrap
from patchkit.bound import Bound
from patchkit.errors import Conflict, InvalidOption, NothingMatched, UnsupportedModel
from patchkit.installation import Installation, find
from patchkit.ordering import conflicts, ordered
from patchkit.recipe_base import Recipe
from patchkit.selection import Indices, matches
from patchkit.sites import Site
from patchkit.text import table

if TYPE_CHECKING:
    from patchkit.patch import Patch


@dataclass(frozen=True)
class Selection:
    """Which sites one recipe takes, and why it leaves the others."""

    recipe: Recipe
    matched: list[Site]
    left: list[tuple[Site, str]]

    def reasons(self) -> dict[str, int]:
        """How many sites are left for each reason."""
        return dict(Counter(reason for _, reason in self.left))


@dataclass(eq=False)
class Plan:
    """A dry run. Print it, read it with :meth:`to_dict`, or carry it out with :meth:`apply`."""

    target: Any
    installation: Installation
    selections: list[Selection]
    steps: int = 50
    tokens: int | None = None
    problems: list[str] = field(default_factory=list)  # conflicts and blockers: apply would refuse
    foreign: list[str] = field(default_factory=list)
    order: list[str] = field(default_factory=list)

    def apply(self) -> Patch:
        """Carry the plan out, on what the target is by now; raises :class:`Conflict` if it has problems."""
        recipes = [s.recipe for s in self.selections]
        return make_plan(self.target, recipes, find(self.target), self.steps, self.tokens).carry_out()

    def carry_out(self) -> Patch:
        """:meth:`apply`, right after the plan was made."""
        from patchkit.patch import Patch

        if self.problems:
            raise Conflict(
                "; ".join(self.problems),
                self.installation.adapter.name,
                "apply one of them only, give them different layers or steps, or remove what is attached",
            )
        return Patch(self.installation, self.selections)

    def predicted(self) -> list[dict[str, Any]]:
        """For each recipe: attention FLOPs as a share of dense, and the speed-up by Amdahl's law.

        Counts multiplications of the denoiser only; memory traffic and launch costs are not in it.
        """
        tokens = self.tokens or self.installation.adapter.tokens()
        rows = []
        for selection in self.selections:
            row: dict[str, Any] = {"recipe": selection.recipe.name, "tokens": tokens, "steps": self.steps}
            if tokens:
                share = _attention_share(self.installation, selection.matched, tokens)
                cost = selection.recipe.attention_cost(tokens, self.steps)
                row |= {
                    "attention_share": round(share, 4),
                    "attention_flops": round(cost, 4),
                    "speed_up": round(1 / (1 - share + share * cost), 3),
                }
            rows.append(row)
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Everything in the plan as plain data."""
        return {
            "target": self.installation.adapter.name,
            "recipes": [
                {
                    "recipe": s.recipe.name,
                    "options": s.recipe.options(),
                    "matched": [site.full_name for site in s.matched],
                    "left": [{"site": site.full_name, "reason": reason} for site, reason in s.left],
                }
                for s in self.selections
            ],
            "order": self.order,
            "conflicts": self.problems,
            "foreign": self.foreign,
            "predicted": self.predicted(),
        }

    def __str__(self) -> str:
        lines = [f"plan for {self.installation.adapter.name}"]
        for selection, row in zip(self.selections, self.predicted(), strict=True):
            lines.append("")
            lines.append(f"{selection.recipe.name}: {len(selection.matched)} of {len(self.installation.sites)} sites")
            lines.append(table(("component", "layers", "kind", "sites"), _groups(selection.matched)))
            lines += [f"  left: {count} x {reason}" for reason, count in selection.reasons().items()]
            if "speed_up" in row:
                lines.append(
                    f"  predicted at {row['tokens']} tokens and {row['steps']} steps: "
                    f"{row['attention_flops']:.0%} of the attention FLOPs, which are {row['attention_share']:.0%} of "
                    f"the denoiser's: at most {row['speed_up']:.2f} x as fast"
                )
            else:
                lines.append("  no prediction: the model does not say how many tokens it runs at (give tokens=)")
        if len(self.order) > 1:
            lines.append("\norder, outermost first: " + " > ".join(self.order))
        lines += [f"\nattached by others: {what}" for what in self.foreign]
        lines += [f"\nCONFLICT: {what}" for what in self.problems]
        return "\n".join(lines)


def make_plan(
    target: Any, recipes: list[Recipe], installation: Installation | None, steps: int, tokens: int | None
) -> Plan:
    """Select sites for each recipe and look for conflicts; changes nothing."""
    if installation is None:
        installation = Installation(target)
        installation.check_free()
    adapter = installation.adapter
    selections = [select(recipe, installation) for recipe in recipes]
    plan = Plan(target, installation, selections, steps, tokens, foreign=adapter.foreign())
    coming = [Bound(s.recipe, plan, s.matched) for s in selections]
    plan.problems = adapter.blockers() + conflicts(installation.bound, coming)
    if not plan.problems:
        try:
            plan.order = [b.recipe.name for b in ordered([*installation.bound, *coming])]
        except Conflict as error:
            plan.problems.append(error.what)
    for selection in selections:
        selection.recipe.prepare(target, selection.matched)
    return plan


def select(recipe: Recipe, installation: Installation) -> Selection:
    """Which sites a recipe takes; raises :class:`NothingMatched` or :class:`UnsupportedModel`."""
    adapter = installation.adapter
    where = f"recipe {recipe.name!r} on {adapter.name}"
    _check_fit(recipe, adapter, where)
    layers = Indices.parse(recipe.layers, f"{where}, option 'layers'")
    counts = {s.component: s.layers for s in installation.sites}
    _check_range(layers, max(counts.values(), default=0), f"{where}, option 'layers'", "blocks")
    heads = Indices.parse(recipe.heads, f"{where}, option 'heads'")
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


def _groups(sites: list[Site]) -> list[tuple[str, str, str, str]]:
    groups: dict[tuple[str, str], list[int]] = {}
    for site in sites:
        groups.setdefault((site.component, site.kind), []).append(site.layer)
    return [(c, _ranges(sorted(set(layers))), k, str(len(layers))) for (c, k), layers in groups.items()]


def _ranges(numbers: list[int]) -> str:
    out: list[list[int]] = []
    for n in numbers:
        if out and n == out[-1][1] + 1:
            out[-1][1] = n
        else:
            out.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in out)


def _attention_share(installation: Installation, sites: list[Site], tokens: int) -> float:
    """Attention's share of a denoiser forward's multiplications: 2 N^2 d of them a site, against N a weight."""
    attention = total = 0.0
    for name, module in installation.adapter.components().items():
        weights = sum(p.numel() for p in unwrap(module).parameters())
        total += weights * tokens
        for site in installation.sites:
            if site.component == name and site.kind != "cross":
                width = _width(site)
                total += 2 * tokens * tokens * width
                attention += 2 * tokens * tokens * width if site in sites else 0
    return attention / total if total else 0.0


def _width(site: Site) -> int:
    width = getattr(site.module, "inner_dim", None)
    if isinstance(width, int):
        return width
    projection = getattr(site.module, "to_q", None)
    return int(getattr(projection, "out_features", 0))
