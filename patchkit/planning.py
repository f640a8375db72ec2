"""What applying would do, worked out before anything is changed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from patchkit.adapters.base import unwrap
from patchkit.bound import Bound
from patchkit.errors import Conflict
from patchkit.installation import Installation, find
from patchkit.matching import Selection, select
from patchkit.ordering import conflicts, ordered
from patchkit.patch import Patch
from patchkit.recipe_base import Recipe
from patchkit.sites import Site
from patchkit.text import table


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
        if self.problems:
            raise Conflict(
                "; ".join(self.problems),
                self.installation.adapter.name,
                "apply one of them only, give them different layers or steps, or remove what is attached",
            )
        return Patch(self.installation, self.selections)

    def predicted(self) -> list[dict[str, Any]]:
        """For each recipe: attention FLOPs as a share of dense, and the speed-up by Amdahl's law; or added forwards.

        Counts multiplications of the denoiser only; memory traffic and launch costs are not in it.
        """
        tokens = self.tokens or self.installation.adapter.tokens()
        rows = []
        for selection in self.selections:
            row: dict[str, Any] = {"recipe": selection.recipe.name, "tokens": tokens, "steps": self.steps}
            added = selection.recipe.added_forwards(selection.matched)
            if added:  # slower by as much, whatever attention costs
                row["added_forwards"] = round(added, 4)
            elif tokens:
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
            if "added_forwards" in row:
                lines.append(f"  predicted: {row['added_forwards']:.2f} more forwards of the denoiser a step")
            elif "speed_up" in row:
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
    plan.selections = [replace(s, prepared=s.recipe.prepare(target, s.matched)) for s in selections]
    return plan


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
