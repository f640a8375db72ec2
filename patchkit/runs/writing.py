"""Writes the results of a run."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchkit import media
from patchkit.recipe_files.fields import VIDEO_SUFFIXES
from patchkit.runs.calls import Produced
from patchkit.runs.outputs import METRICS, Names, staging

if TYPE_CHECKING:
    from patchkit.runs.running import Job, Measured

FPS = 8  # diffusers' own default


def write(job: Job, measured: Measured, inputs: Mapping[str, Any]) -> dict[str, Path]:
    """Write all files of a run, and say in its notes which were there before. Returns label -> (first) file.

    What recipes draw is written where there is more than one file anyway: in comparisons, and into folders.
    """
    assert job.file.output is not None
    produced, metrics, notes = measured.produced, measured.metrics, measured.notes
    names = Names(job.file.output)
    fps = int(inputs.get("fps") or inputs.get("frame_rate") or FPS)
    files: dict[str, str] = {}
    with staging(names.folder) as stage:

        def put(label: str, suffix: str, content: Any, number: int | None = None) -> None:
            name = names.of(label, suffix, primary=label == job.primary, number=number)
            save(content, stage.path(name), fps)
            files.setdefault(label, name)

        for label, made in produced.items():
            suffix = names.suffix(made.kind)
            for i, item in enumerate(made.items if suffix != ".json" else ()):
                put(label, suffix, item, i if len(made.items) > 1 else None)
        for title, picture in measured.pictures.items() if len(produced) > 1 or names.output.folder else ():
            put(_file_name(title), ".png", picture)
        if len(produced) > 1:
            _together(produced, names, put)
            files["metrics"] = METRICS
        if names.output.suffix == ".json":
            files["record"] = names.output.path.name
        metrics["files"] = files
        texts = {label: made.items for label, made in produced.items() if made.kind == "text"}
        record = to_json(metrics | ({"texts": texts} if texts else {}))
        for name in dict.fromkeys(files[label] for label in ("metrics", "record") if label in files):
            stage.path(name).write_text(record, encoding="utf-8")
        other = _other_run(names.folder / METRICS, files) if "metrics" in files else None
        done = {path.name: path for path in stage.commit()}
        if stage.replaced:
            notes.append(f"replaced what was there before: {', '.join(str(path) for path in stage.replaced)}")
        if other:
            notes.append(f"the {METRICS} that was replaced told of {other}; a folder for each comparison keeps both")
    return {label: done[name] for label, name in files.items()}


def _file_name(title: str) -> str:
    """``patched.var, sinks of image 1`` -> ``patched.var-sinks-of-image-1``."""
    return re.sub(r"[^\w.]+", "-", title).strip("-")


def _other_run(metrics: Path, files: Mapping[str, str]) -> str | None:
    """What an existing metrics file tells of, if not of the files that are about to be written."""
    try:
        told = json.loads(metrics.read_text(encoding="utf-8"))["files"]
        return None if told == files else str(metrics.parent / told.get("patched", next(iter(told.values()))))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, StopIteration):
        return None  # there is none, or it is somebody else's


def _together(produced: Mapping[str, Produced], names: Names, put: Callable[..., None]) -> None:
    """One file with all variants beside each other, and one picture of their frames."""
    kind = next(iter(produced.values())).kind
    if kind == "text" or len({made.kind for made in produced.values()}) > 1:
        return
    first = {label: media.as_tensor(made.items[0]) for label, made in produced.items()}
    same_size = len({clip.shape[-2:] for clip in first.values()}) == 1
    suffix = ".png" if kind == "image" else names.suffix(kind)
    if same_size and (kind == "image" or suffix in VIDEO_SUFFIXES):
        put("side-by-side", suffix, media.side_by_side(first))
    if kind == "video":
        put("frames", ".png", media.contact_sheet(first))


def save(content: Any, path: Path, fps: int) -> None:
    """Write one result: text as it is, everything else in the form of the suffix."""
    if isinstance(content, str):
        path.write_text(content + "\n", encoding="utf-8")
    else:
        media.save(content, path, fps)


def to_json(data: Any) -> str:
    """Strict JSON text: numbers that are none become null, and what JSON does not know is written in words."""
    return json.dumps(finite(data), indent=2, default=str, ensure_ascii=False, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """The same data without infinities and NaNs."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value
