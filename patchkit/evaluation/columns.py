"""The figures of a comparison: what each is called, how rows give it, whether more is better, how it is averaged."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from patchkit import intervals
from patchkit.intervals import Interval
from patchkit.zoo.worlds import World

Row = Mapping[str, Any]
MIB = 2**20
COSINE = (-1.0, 1.0)
# How values of one variant become one figure, and how those of two variants are set against each other.
_AVERAGES: dict[str, tuple[Callable[..., Interval], Callable[..., Interval]]] = {
    "share": (intervals.share, intervals.share_difference),
    "mean": (intervals.mean, intervals.difference),
    "ratio": (intervals.mean, intervals.ratio),
}


@dataclass(frozen=True)
class Column:
    """One figure.

    Attributes:
        key: its name in files.
        title: its name for people.
        group: what it belongs to: ``prompt``, ``dense``, ``edit``, ``time``, ``cost`` or ``recipe``.
        better: ``"more"``, ``"less"``, or empty where neither is.
        average: ``"share"`` of samples, ``"mean"``, or ``"ratio"`` (a mean that is set against dense as a factor).
        digits: behind the point; shares are shown in per cent.
        unit: behind the number.
        meaning: one sentence.
        read: a row's own figure, None where it has none.
        limits: what it cannot be below or above, and neither can its interval.
    """

    key: str
    title: str
    group: str
    better: str
    average: str
    digits: int
    unit: str
    meaning: str
    read: Callable[[Row], float | None]
    limits: tuple[float, float] = (0.0, math.inf)

    def interval(self, values: list[float]) -> Interval:
        """The figure of one variant."""
        value, low, high, n = _AVERAGES[self.average][0](values)
        if low is None or high is None:
            return Interval(value, low, high, n)
        return Interval(value, max(low, self.limits[0]), min(high, self.limits[1]), n)

    def against(self, values: list[float], reference: list[float]) -> Interval | None:
        """The figure of one variant against another, sample by sample; None where a factor cannot be told."""
        if self.average == "ratio" and min((*values, *reference)) <= 0:
            return None
        return _AVERAGES[self.average][1](values, reference)

    def text(self, value: float | None) -> str:
        """A number as people read it."""
        if value is None:
            return ""
        if self.average == "share":
            return f"{100 * value:.0f} %"
        return f"{value:.{self.digits}f}" + (f" {self.unit}" if self.unit else "")


def of_world(world: World | None) -> list[Column]:
    """What the detectors tell."""
    if world is None:
        return []
    found = [
        Column("right", "all right", "prompt", "more", "share", 0, "", "everything is as the prompt asks", _all_right)
    ]
    found += [
        Column(f"right_{a}", a, "prompt", "more", "share", 0, "", f"the {a} is as the prompt asks", _right(a))
        for a in world.attributes
    ]
    meaning = "objects of the right colour and shape, of all that were asked for"
    return [*found, Column("objects", "objects", "prompt", "more", "share", 0, "", meaning, _objects)]


def columns(world: World | None) -> list[Column]:
    """All figures, in the order in which they are shown."""
    dense = "the unpatched result from the same seed"
    value = lambda name: lambda row: row["values"].get(name)  # noqa: E731
    cost = lambda name, unit=1: lambda row: row["costs"][name] / unit if name in row["costs"] else None  # noqa: E731
    add = Column
    return [
        *of_world(world),
        add(
            "psnr", "PSNR", "dense", "more", "mean", 1, "dB", f"likeness to {dense}, without equal ones", value("psnr")
        ),
        add(
            "ssim", "SSIM", "dense", "more", "mean", 3, "", f"likeness of structures to {dense}", value("ssim"), COSINE
        ),
        add("lpips", "LPIPS", "dense", "less", "mean", 3, "", f"perceptual distance to {dense}", value("lpips")),
        add("identical", "identical", "dense", "", "share", 0, "", f"equal to {dense}", _identical),
        add("outside_psnr", "outside PSNR", "edit", "more", "mean", 1, "dB", _OUTSIDE, value("outside_psnr")),
        add(
            "outside_mae",
            "outside error",
            "edit",
            "less",
            "mean",
            2,
            "/255",
            _CHANGE,
            value("outside_mae"),
        ),
        add("smoothness", "smoothness", "time", "more", "mean", 4, "", _SMOOTH, value("smoothness"), COSINE),
        add("smoothness_worst", "worst step", "time", "more", "mean", 4, "", _WORST, value("smoothness_worst"), COSINE),
        add("flicker", "flicker", "time", "less", "mean", 2, "/255", _FLICKER, value("flicker")),
        add("clip_text", "CLIP text", "prompt", "more", "mean", 3, "", _CLIP, value("clip_text"), COSINE),
        add("clip_frames", "CLIP frames", "time", "more", "mean", 4, "", _FRAMES, value("clip_frames"), COSINE),
        add("dino_frames", "DINO frames", "time", "more", "mean", 4, "", _FRAMES, value("dino_frames"), COSINE),
        add("seconds", "seconds", "cost", "less", "ratio", 2, "s", "of one call", cost("seconds")),
        add("peak_memory", "peak memory", "cost", "less", "ratio", 1, "MiB", "of one call", cost("peak_memory", MIB)),
        add("evaluations", "evaluations", "cost", "less", "ratio", 1, "", _EVALUATIONS, cost("evaluations")),
        add("evaluated_samples", "as samples", "cost", "less", "ratio", 1, "", _SAMPLES, cost("evaluated_samples")),
        add("density", "density", "recipe", "", "mean", 3, "", "measured density of the recipe", _density),
    ]


_OUTSIDE = "likeness where nothing should change"
_CHANGE = "mean error where nothing should change"
_SMOOTH = "how alike frames that follow each other are (colours and outlines), at most 1"
_WORST = "the same for the two frames that differ most: jumps and flashes"
_FLICKER = "trembling of what stands still, in levels of brightness"
_CLIP = "cosine of prompt and picture by CLIP"
_FRAMES = "cosine of frames that follow each other, by this network's features"
_EVALUATIONS = "forwards of the denoiser in one call"
_SAMPLES = "the same, a batch of two counting twice"


def _all_right(row: Row) -> float | None:
    return float(row["verdict"]["all"]) if row["verdict"] else None


def _right(attribute: str) -> Callable[[Row], float | None]:
    def read(row: Row) -> float | None:
        right = row["verdict"]["right"] if row["verdict"] else {}
        return float(right[attribute]) if attribute in right else None

    return read


def _objects(row: Row) -> float | None:
    found = row["verdict"]["objects"] if row["verdict"] else []
    return sum(o["colour"] and o["shape"] for o in found) / len(found) if found else None


def _identical(row: Row) -> float | None:
    return float(row["identical"]) if "identical" in row else None


def _density(row: Row) -> float | None:
    found = row["density"] or {}
    value = found.get("actual") if "actual" in found else None
    return float(value) if isinstance(value, int | float) else None
