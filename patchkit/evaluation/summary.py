"""From rows to figures with intervals.

Every sample has noise of its own, so samples are taken as independent. Intervals are for this set of prompts and new
seeds (a little wide: differences between prompts count as chance); with one seed a prompt also for new prompts of the
same kind. Figures against dense are paired: the same prompt and the same noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from patchkit.evaluation.columns import Column, columns
from patchkit.evaluation.request import DENSE, Request

Row = Mapping[str, Any]


def summarise(request: Request, rows: Sequence[Row], missing: Mapping[str, str]) -> dict[str, Any]:
    """Everything that the table and the page show, as plain data.

    Args:
        request: what was compared.
        rows: of all samples.
        missing: figure -> why it could not be had.
    """
    known = columns(request.world)
    by_variant: dict[str, dict[Any, Row]] = {
        v.label: {(r["case"], r["seed"]): r for r in rows if r["variant"] == v.label} for v in request.variants
    }
    dense = by_variant[DENSE]
    variants: dict[str, dict[str, Any]] = {}
    for variant in request.variants:
        own = by_variant[variant.label]
        figures = {c.key: _figure(c, own, None if variant.label == DENSE else dense) for c in known}
        variants[variant.label] = {
            "recipes": [{"name": r.name, "options": r.options(defaults=True)} for r in variant.recipes],
            "samples": len(own),
            "figures": {key: figure for key, figure in figures.items() if figure is not None},
        }
    used = [c for c in known if any(c.key in v["figures"] for v in variants.values())]
    spec = request.job.file.model
    return {
        "model": spec.id if spec is not None else "",
        "kind": rows[0]["kind"],
        "prompts": len(request.cases),
        "seeds": request.seeds,
        "memory_means": rows[0]["memory_means"],
        "variants": variants,
        "columns": [_described(c, variants) for c in used],
        "missing": _missing(known, variants, rows, missing),
    }


def _figure(column: Column, rows: Mapping[Any, Row], dense: Mapping[Any, Row] | None) -> dict[str, Any] | None:
    values = {place: value for place, row in rows.items() if (value := column.read(row)) is not None}
    if not values:
        return None
    out: dict[str, Any] = column.interval(list(values.values())).to_dict()
    if dense is not None:
        pairs = [(v, other) for p, v in values.items() if p in dense and (other := column.read(dense[p])) is not None]
        found = column.against([a for a, _ in pairs], [b for _, b in pairs]) if pairs else None
        out["against_dense"] = None if found is None else found.to_dict()
    return out


def _described(column: Column, variants: Mapping[str, Any]) -> dict[str, Any]:
    found = {label: v["figures"][column.key]["value"] for label, v in variants.items() if column.key in v["figures"]}
    best: list[str] = []
    if column.better and len(found) > 1:
        top = (max if column.better == "more" else min)(found.values())
        best = [label for label, value in found.items() if column.text(value) == column.text(top)]
    return {
        "key": column.key,
        "title": column.title,
        "group": column.group,
        "better": column.better,
        "unit": column.unit,
        "meaning": column.meaning,
        "best": best if len(best) < len(found) else [],  # where all are alike none is best
    }


def _missing(
    known: Sequence[Column], variants: Mapping[str, Any], rows: Sequence[Row], reasons: Mapping[str, str]
) -> dict[str, str]:
    """Figures that results of this kind could have but no variant has, and why."""
    kind = rows[0]["kind"]
    possible = {c.key for c in known if kind == "video" or (kind == "image" and c.group != "time")}
    told = {key: why for key, why in reasons.items() if key in possible}
    told["peak_memory"] = rows[0]["memory_means"]
    used = {key for v in variants.values() for key in v["figures"]}
    return {c.key: told[c.key] for c in known if c.key in told and c.key not in used}
