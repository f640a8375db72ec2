"""What a patch did in the last run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from patchkit.bound import Bound
from patchkit.drift import drift
from patchkit.installation import Installation
from patchkit.text import table

if TYPE_CHECKING:
    from PIL.Image import Image

    from patchkit.recipe_base import Recipe


@dataclass(frozen=True)
class Report:
    """Read it with :meth:`to_dict`, or print it: ``str`` gives a row a layer, :meth:`per_head` one a head."""

    data: dict[str, Any]
    kinds: Mapping[str, type[Recipe]] = field(default_factory=dict, repr=False, compare=False)  # those it tells of

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists."""
        return self.data

    def __getitem__(self, name: str) -> Any:
        return self.data[name]

    def per_head(self) -> str:
        """A row a layer and head, of every figure that was noted per head (averaged over the batch)."""
        lines = []
        for recipe in self.data["recipes"]:
            names = [n for n in _numeric_names(recipe) if any(_by_head(r, n) for r in recipe["rows"])]
            rows = [
                (str(r.get("layer", "")), r["component"], r["branch"], str(head), *(_at(r, n, head) for n in names))
                for r in recipe["rows"]
                for head in range(r.get("heads", 0))
            ]
            if names and rows:
                lines += [recipe["recipe"], table(("layer", "component", "branch", "head", *names), rows)]
        return "\n".join(lines) or "nothing was noted per head"

    def cautions(self) -> list[str]:
        """What a reader must not miss, a sentence each."""
        return [f"{recipe['recipe']}: {text}" for recipe in self.data["recipes"] for text in recipe["cautions"]]

    def pictures(self) -> dict[str, Image]:
        """Pictures of what recipes did, ``"recipe, title"`` -> picture; most recipes draw none."""
        found: dict[str, Image] = {}
        for account in self.data["recipes"]:
            kind = self.kinds.get(account["recipe"])
            for title, picture in (kind.pictures(account) if kind is not None else {}).items():
                found[f"{account['recipe']}, {title}"] = picture
        return found

    def __str__(self) -> str:
        lines = [f"patch on {self.data['target']}" + ("" if self.data["enabled"] else " (disabled)")]
        lines += [f"NOTE: {text}" for text in self.cautions()]
        for recipe in self.data["recipes"]:
            lines += ["", *_recipe_lines(recipe)]
        lines += [f"attached by others: {what}" for what in self.data["foreign"]]
        lines += [f"DRIFT: {what}" for what in self.data["drift"]]
        return "\n".join(lines)


def make_report(installation: Installation, bounds: list[Bound], left: list[dict[str, int]], enabled: bool) -> Report:
    """Gather the ledgers of one patch."""
    return Report(
        {
            "target": installation.adapter.name,
            "enabled": enabled,
            "recipes": [_recipe(b, reasons) for b, reasons in zip(bounds, left, strict=True)],
            "foreign": installation.adapter.foreign(),
            "drift": drift(installation),
        },
        {b.recipe.name: type(b.recipe) for b in bounds},
    )


def no_report(target: str, why: str) -> Report:
    """Stands in where figures could not be read."""
    return Report({"target": target, "enabled": False, "recipes": [], "foreign": [], "drift": [why]})


def _recipe(bound: Bound, left: dict[str, int]) -> dict[str, Any]:
    sites = {(s.component, s.name): s for s in bound.sites}
    rows: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    dense: Counter[str] = Counter()
    seconds: dict[str, float] = {}
    for (component, name, branch, index), ledger in bound.ledgers.items():
        entry = ledger.to_dict()
        if not any(entry.values()):  # of a block that was only looked at
            continue
        site = sites.get((component, name))
        where = {"component": component, "site": name, "branch": branch, "index": index}
        if site is not None:
            where |= {"layer": site.layer, "kind": site.kind, "heads": site.heads}
        rows.append(where | entry)
        counts.update(entry["counts"])
        dense.update(entry["dense"])
        for what, value in entry["seconds"].items():
            seconds[what] = seconds.get(what, 0.0) + value
    totals = {
        "counts": dict(counts),
        "seconds": {name: round(value, 6) for name, value in seconds.items()},
        "means": _means(rows),
    }
    return totals | {
        "recipe": bound.recipe.name,
        "options": bound.recipe.options(defaults=True),
        "sites": len(bound.sites),
        "left": left,
        "calls": sum(r["calls"] for r in rows),
        "dense": dict(dense),
        "figures": bound.recipe.figures(totals),
        "cautions": _cautions(rows, len(bound.sites)),
        "rows": rows,
    }


def _means(rows: list[dict[str, Any]]) -> dict[str, float]:
    gathered: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row["values"].items():
            numbers = _flat(value)
            if numbers:
                gathered.setdefault(name, []).append(sum(numbers) / len(numbers))
    return {name: sum(v) / len(v) for name, v in gathered.items()}


def _cautions(rows: list[dict[str, Any]], sites: int) -> list[str]:
    """One sentence for each thing cautioned of, with the number of sites and the reason that most of them gave."""
    places: dict[str, dict[tuple[str, str], str]] = {}
    for row in rows:
        for what, why in row["cautions"].items():
            places.setdefault(what, {})[row["component"], row["site"]] = why
    return [
        f"{what} at {len(found)} of {sites} sites: {Counter(found.values()).most_common(1)[0][0]}"
        for what, found in places.items()
    ]


def _flat(value: Any) -> list[float]:
    if isinstance(value, bool):
        return []
    if isinstance(value, int | float):
        return [float(value)]
    if isinstance(value, list):
        return [x for v in value for x in _flat(v)]
    return []


def _recipe_lines(recipe: dict[str, Any]) -> list[str]:
    lines = [f"{recipe['recipe']}: {recipe['sites']} sites, {recipe['calls']} calls"]
    lines += [f"  left unpatched: {count} x {reason}" for reason, count in recipe["left"].items()]
    if not recipe["rows"]:
        return [*lines, "  nothing ran yet"]
    lines += [f"  {what}: {count}" for what, count in recipe["counts"].items()]
    lines += [f"  ran dense: {count} x {reason}" for reason, count in recipe["dense"].items()]
    lines += [f"  seconds in {what}: {value:.3f}" for what, value in recipe["seconds"].items()]
    lines += [f"  {what}: {value:.3g}" for what, value in recipe["figures"].items()]
    lines += [f"  {what}: {text} ({count} x)" for (what, text), count in _remarks(recipe).items()]
    names = _numeric_names(recipe)
    head = ("layer", "site", "branch", "calls", *names)
    rows = [
        (
            str(r.get("layer", "")),
            f"{r['component']}.{r['site']}" + (f"[{r['index']}]" if r["index"] else ""),
            r["branch"],
            str(r["calls"]),
            *(_span(r["values"].get(n)) for n in names),
        )
        for r in recipe["rows"]
    ]
    return [*lines, table(head, rows)]


def _numeric_names(recipe: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(n for r in recipe["rows"] for n, v in r["values"].items() if _flat(v)))


def _remarks(recipe: dict[str, Any]) -> Counter[tuple[str, str]]:
    """What was noted in words, and at how many sites."""
    return Counter((n, v) for r in recipe["rows"] for n, v in r["values"].items() if isinstance(v, str))


def _by_head(row: dict[str, Any], name: str) -> list[float]:
    """A figure of (heads,) or (batch, heads), averaged over the batch; empty for any other."""
    value = row["values"].get(name)
    if not isinstance(value, list) or not value:
        return []
    samples = value if isinstance(value[0], list) else [value]
    if any(len(sample) != row.get("heads") for sample in samples):
        return []
    return [sum(column) / len(column) for column in zip(*samples, strict=True)]


def _at(row: dict[str, Any], name: str, head: int) -> str:
    found = _by_head(row, name)
    return f"{found[head]:.3g}" if found else "-"


def _span(value: Any) -> str:
    numbers = _flat(value)
    if not numbers:
        return "-"
    mean = sum(numbers) / len(numbers)
    low, high = min(numbers), max(numbers)
    return f"{mean:.3g}" if low == high else f"{mean:.3g} ({low:.3g} to {high:.3g})"
