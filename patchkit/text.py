"""Plain text: tables for plans and reports, and how long something takes."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]], indent: str = "  ") -> str:
    """Columns padded to their widest entry; numbers to the right."""
    cells = [list(head), *[list(r) for r in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    right = [all(_numeric(row[i]) for row in cells[1:]) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        parts = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        return (indent + "  ".join(parts)).rstrip()

    return "\n".join([line(cells[0]), indent + "  ".join("-" * w for w in widths), *map(line, cells[1:])])


def _numeric(text: str) -> bool:
    return bool(text) and text[0] in "0123456789-+."


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3 h 20 min``."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
