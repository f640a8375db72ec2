"""Writes the results of a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchkit import media
from patchkit.calls import Produced
from patchkit.outputs import METRICS, Names, staging

if TYPE_CHECKING:
    from patchkit.running import Job

FPS = 8  # diffusers' own default


def write(
    job: Job,
    produced: Mapping[str, Produced],
    metrics: dict[str, Any],
    inputs: Mapping[str, Any],
    notes: list[str],
) -> dict[str, Path]:
    """Write all files of a run, and say in ``notes`` which were there before. Returns label -> file."""
    assert job.file.output is not None
    names = Names(job.file.output)
    fps = int(inputs.get("fps") or inputs.get("frame_rate") or FPS)
    files: dict[str, str] = {}
    with staging(names.folder) as stage:

        def put(label: str, suffix: str, save: Callable[[Path], Any], number: int | None = None) -> None:
            name = names.of(label, suffix, primary=label == job.primary, number=number)
            save(stage.path(name))
            files.setdefault(label, name)

        for label, made in produced.items():
            suffix = names.suffix(made.kind)
            if suffix == ".json":
                continue
            for i, item in enumerate(made.items):
                number = i if len(made.items) > 1 else None
                put(label, suffix, lambda path, item=item, kind=made.kind: save_item(item, kind, path, fps), number)
        if len(produced) > 1:
            _together(produced, names.suffix(next(iter(produced.values())).kind), put, fps)
        texts = {label: made.items for label, made in produced.items() if made.kind == "text"}
        record = metrics | ({"texts": texts} if texts else {})
        if len(produced) > 1:
            files["metrics"] = METRICS
        if names.suffix("text") == ".json":
            files[job.primary or "record"] = job.file.output.path.name
        metrics["files"] = dict(files)
        record["files"] = dict(files)
        for name in [n for label, n in files.items() if label == "metrics" or n.endswith(".json")]:
            stage.path(name).write_text(to_json(record), encoding="utf-8")
        done = {path.name: path for path in stage.commit()}
        notes += [f"replaced {path}" for path in stage.replaced]
    return {label: done[name] for label, name in files.items()}


def _together(produced: Mapping[str, Produced], suffix: str, put: Callable[..., None], fps: int) -> None:
    """One video with all variants beside each other, and one picture of their frames."""
    kind = next(iter(produced.values())).kind
    if kind == "text":
        return
    first = {label: made.items[0] for label, made in produced.items()}
    if kind == "video":
        if suffix in (".mp4", ".gif"):
            put("side-by-side", suffix, lambda path: media.save_video(media.side_by_side(first), path, fps=fps))
        put("frames", ".png", lambda path: media.save_image(media.contact_sheet(first), path))
    else:
        put("side-by-side", ".png", lambda path: media.save_image(media.side_by_side(first), path))


def save_item(item: Any, kind: str, path: Path, fps: int) -> None:
    """Write one result."""
    if kind == "text":
        path.write_text(item + "\n", encoding="utf-8")
    elif kind == "image":
        media.save_image(item, path)
    elif path.suffix == ".png":
        media.save_image(media.contact_sheet({"": item}), path)
    else:
        media.save_video(item, path, fps=fps)


def to_json(data: Any) -> str:
    """JSON text; what JSON cannot hold (a tensor, a path) is written as its words."""
    return json.dumps(data, indent=2, default=str, ensure_ascii=False, allow_nan=True) + "\n"
