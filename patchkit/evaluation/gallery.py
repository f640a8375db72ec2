"""What a comparison made, to look at: each prompt with the results of all variants beside each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from patchkit.evaluation import pictures
from patchkit.evaluation.measures import Result
from patchkit.evaluation.request import DENSE
from patchkit.evaluation.store import Store
from patchkit.evaluation.table import colour

Row = Mapping[str, Any]
LIMIT = 9_000_000  # characters of all pictures on the page


@dataclass(frozen=True)
class Gallery:
    """The gallery as HTML, and of how many samples it is."""

    html: str
    shown: int
    total: int


def make(rows: Sequence[Row], variants: Sequence[str], store: Store, limit: int = LIMIT) -> Gallery:
    """Show samples, prompt by prompt, as many as fit.

    Args:
        rows: of all samples.
        variants: names, the unpatched model first.
        store: where the samples are.
        limit: characters that all pictures may take.
    """
    groups: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["case"], row["seed"]), []).append(row)
    made: dict[tuple[int, int], str] = {}
    left, shown = limit, 0
    for place in _by_interest(groups):
        group = sorted(groups[place], key=lambda r: variants.index(r["variant"]))
        text = _group(group, variants, store)
        if len(text) > left and made:
            break  # the first one is shown whatever its size
        made[place] = text
        left -= len(text)
        shown += len(group)
    return Gallery("".join(_cases(made, groups)), shown, len(rows))


def _by_interest(groups: Mapping[tuple[int, int], Sequence[Row]]) -> list[tuple[int, int]]:
    """The first seed of each prompt; then those where something is wrong; then the others."""
    seen: set[int] = set()

    def rank(place: tuple[int, int]) -> int:
        first = place[0] not in seen
        seen.add(place[0])
        return 0 if first else 1 if any(_wrong(row) for row in groups[place]) else 2

    order = sorted(groups)
    ranks = {place: rank(place) for place in order}
    return sorted(order, key=lambda place: (ranks[place], place))


def _wrong(row: Row) -> bool:
    return bool(row["verdict"]) and not row["verdict"]["all"]


def _cases(made: Mapping[tuple[int, int], str], groups: Mapping[tuple[int, int], Sequence[Row]]) -> Iterable[str]:
    for case in sorted({place[0] for place in made}):
        prompt = next(rows[0]["prompt"] for place, rows in groups.items() if place[0] == case)
        parts = [made[place] for place in sorted(made) if place[0] == case]
        yield f'<section class="case" data-case="{case}"><h3>{escape(prompt)}</h3>{"".join(parts)}</section>'


def _group(group: Sequence[Row], variants: Sequence[str], store: Store) -> str:
    dense = next((row for row in group if row["variant"] == DENSE), None)
    reference = store.result(dense) if dense is not None else None
    figures = [_figure(row, variants, store.result(row), reference) for row in group]
    return f'<div class="row"><p class="soft seed">seed {int(group[0]["seed"])}</p>{"".join(figures)}</div>'


def _figure(row: Row, variants: Sequence[str], result: Result, reference: Result | None) -> str:
    number = variants.index(row["variant"])
    name = escape(row["variant"], quote=True)
    return (
        f'<figure class="{colour(number)}" data-variant="{number}"{" data-wrong" if _wrong(row) else ""}>'
        f"{_content(row, result, reference, name)}{_drawn(row)}"
        f"<figcaption><b>{name}</b>{_verdict(row)}{_figures(row)}</figcaption>"
        "</figure>"
    )


def _content(row: Row, result: Result, reference: Result | None, name: str) -> str:
    if result.pixels is None:
        return f"<pre>{escape(result.text)}</pre>"
    small = " pixels" if max(result.pixels.shape[-2:]) <= pictures.SMALL else ""
    alt = escape(f"{row['variant']}: {row['prompt']}", quote=True)
    shown = f'<img class="result{small}" alt="{alt}" src="{pictures.animation(result.pixels)}">'
    if row["variant"] == DENSE or reference is None or reference.pixels is None:
        return shown
    if reference.pixels.shape != result.pixels.shape:
        return shown + '<p class="soft">another size than dense</p>'
    source = pictures.difference(result.pixels, reference.pixels)
    drawn = f'<img class="difference{small}" alt="difference of {name} to dense" src="{source}">'
    return f'<div class="pair">{shown}{drawn}</div>'


def _drawn(row: Row) -> str:
    """What recipes draw of what they did, each under its title."""
    return "".join(
        f'<p class="soft">{escape(title)}</p><img class="drawn" alt="{escape(title, quote=True)}" src="{source}">'
        for title, source in row.get("drawn", {}).items()
        if source.startswith("data:image/png;base64,")
    )


def _verdict(row: Row) -> str:
    if not row["verdict"]:
        return ""
    read = row["verdict"]["read"]
    parts = []
    for attribute, right in row["verdict"]["right"].items():
        seen = "" if right or attribute not in read else f" (read: {read[attribute]})"
        parts.append(
            f'<span class="{"yes" if right else "no"}">{"✓" if right else "✗"} {escape(attribute + seen)}</span>'
        )
    if not row["verdict"]["all"] and "objects" in read:
        parts.append(f'<span class="soft">seen: {escape(read["objects"])}</span>')
    return f'<span class="verdict">{"".join(parts)}</span>'


def _figures(row: Row) -> str:
    said = [f"{row['costs']['seconds']:.2f} s"]
    if row.get("identical"):
        said.insert(0, "identical to dense")
    elif "psnr" in row["values"]:
        said.insert(0, f"PSNR {row['values']['psnr']:.1f} dB")
    return f'<span class="soft">{escape(", ".join(said))}</span>'
