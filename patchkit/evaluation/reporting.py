"""Writes what a comparison found: a page, a table, and the figures for machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from patchkit.evaluation import page, table
from patchkit.evaluation.request import Request
from patchkit.evaluation.store import ROWS, Store
from patchkit.media import replacing
from patchkit.runs.writing import to_json

PAGE, TABLE, SUMMARY = "report.html", "table.md", "summary.json"


def write(
    request: Request, store: Store, rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], notes: Sequence[str]
) -> dict[str, Path]:
    """Write all files, each whole or not at all. Returns label -> file."""
    texts = {
        "page": (PAGE, page.make(request, store, rows, summary, notes)),
        "table": (TABLE, table.markdown(summary, request.world)),
        "summary": (SUMMARY, to_json({**summary, "notes": list(notes)})),
    }
    files = {}
    for label, (name, text) in texts.items():
        with replacing(request.output / name) as part:
            part.write_text(text, encoding="utf-8")
        files[label] = request.output / name
    return {**files, "samples": request.output / ROWS}
