"""What a hunt maximises: functions of a picture and its prompt, and the paper's rules of ranking.

An objective is any callable ``(image, prompt) -> number``; more is better. It may instead give several named numbers,
and then has a method ``rank(means)`` that makes one number of their means over all pictures of a head (minus infinity:
not to be taken). ``name`` says what it is in stores and presets. Recipe files name the shipped ones; see :func:`build`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from patchkit.errors import InvalidOption, nearest

Objective = Callable[[Any, str], Any]  # (image, prompt) -> float, or {name: float} of one that has `rank`
LEAST = float("-inf")


def name_of(objective: Objective) -> str:
    """What stores and presets call it."""
    said = getattr(objective, "name", None)
    return str(said or getattr(objective, "__qualname__", type(objective).__name__))


def rank(objective: Objective, scores: list[Any]) -> float:
    """One number for the scores of all pictures of a head."""
    if not isinstance(scores[0], Mapping):
        return math.fsum(scores) / len(scores)
    means = {name: math.fsum(s[name] for s in scores) / len(scores) for name in scores[0]}
    ranked: float = objective.rank(means)  # type: ignore[attr-defined]
    return ranked


# --- the shape world of the zoo


@dataclass(frozen=True)
class ShapeWorld:
    """How much a picture or clip of the zoo's shape world is what its caption says, 0 to 1.

    The mean of: each attribute that the detectors find right (0 or 1), how near the pixels are to the colours that the
    caption names (*clarity*), and for pictures how well the outlines fit. The last two tell good from better where all
    attributes are right already; on those alone most heads would tie.
    """

    name: str = "shape-world"

    def __call__(self, image: Any, prompt: str) -> float:
        """Score one picture, or one clip; raises ``ValueError`` for a prompt that is no caption of the world."""
        parts = self.parts(image, prompt)
        return sum(parts.values()) / len(parts)

    def parts(self, image: Any, prompt: str) -> dict[str, float]:
        """What the score is the mean of."""
        from patchkit.zoo import detect, detect_stills, stills

        try:
            wanted = stills.Description.parse(prompt)
        except ValueError:
            asked = detect.Attributes.of_prompt(prompt)
            right = detect.detect(image).right(asked)
            return {n: float(v) for n, v in right.items()} | {
                "clarity": _clarity(image, asked.background, [asked.colour])
            }
        read = detect_stills.detect(image)
        parts = {n: float(v) for n, v in read.right(wanted).items()}
        parts["clarity"] = _clarity(image, wanted.background, [item.colour for item in wanted.items])
        pairs = list(zip(read.match(wanted), wanted.items, strict=True))
        if pairs:
            fits = [o.iou if o is not None and o.shape == item.shape else 0.0 for o, item in pairs]
            parts["outline"] = sum(fits) / len(fits)
        return parts


def _clarity(image: Any, background: str, colours: list[str]) -> float:
    import torch

    from patchkit.media import as_tensor
    from patchkit.zoo.detect import COLOUR_TOLERANCE
    from patchkit.zoo.world import BACKGROUNDS, COLOURS

    palette = torch.tensor([BACKGROUNDS[background], *(COLOURS[c] for c in colours)])
    pixels = as_tensor(image)[:, None]  # (frames, 1, 3, H, W)
    distance = (pixels - palette[None, :, :, None, None]).norm(dim=2).amin(dim=1)
    return float((1 - distance / COLOUR_TOLERANCE).clamp_min(0).mean())


# --- rules of ranking


@dataclass(frozen=True)
class Thresholding:
    """Heads whose means reach all ``floors`` are ranked by another objective, the others are not taken.

    The paper's second rule: floors of 20 (PickScore) and 6 (aesthetics), ranked by the CLIP score.
    """

    by: Objective
    floors: tuple[tuple[Objective, float], ...]

    @property
    def name(self) -> str:
        floors = ", ".join(f"{name_of(o)} >= {floor:g}" for o, floor in self.floors)
        return f"{name_of(self.by)} where {floors}"

    def __call__(self, image: Any, prompt: str) -> dict[str, float]:
        """All numbers of one picture."""
        found = {f"floor {i}": float(o(image, prompt)) for i, (o, _) in enumerate(self.floors)}
        return found | {"by": float(self.by(image, prompt))}

    def rank(self, means: Mapping[str, float]) -> float:
        """The mean to rank by, or minus infinity."""
        reached = all(means[f"floor {i}"] >= floor for i, (_, floor) in enumerate(self.floors))
        return means["by"] if reached else LEAST


@dataclass(frozen=True)
class Harmonic:
    """The harmonic mean of the means of several objectives, 2pc / (p + c) for two: the paper's third rule."""

    of: tuple[Objective, ...]

    @property
    def name(self) -> str:
        return f"harmonic mean of {' and '.join(name_of(o) for o in self.of)}"

    def __call__(self, image: Any, prompt: str) -> dict[str, float]:
        """All numbers of one picture."""
        return {str(i): float(o(image, prompt)) for i, o in enumerate(self.of)}

    def rank(self, means: Mapping[str, float]) -> float:
        """Their harmonic mean; one that is not above 0 spoils it."""
        values = list(means.values())
        return len(values) / sum(1 / v for v in values) if min(values) > 0 else LEAST


# --- by name, as recipe files have it


def build(spec: Any, where: str = "option 'objective'", device: str = "cpu") -> Objective:
    """The objective that a recipe file names.

    Args:
        spec: ``"shape-world"``; ``{"clip": ID}``, ``{"pickscore": ID}`` or ``{"aesthetic": ID}`` (a folder or hub id,
            or ``{id: ID, template: TEXT}`` with ``{prompt}`` in it); ``{"harmonic": [SPEC, SPEC]}``;
            ``{"thresholding": {"by": SPEC, "floors": [[SPEC, NUMBER], ...]}}``; or ``"module:function"``.
        where: for messages.
        device: where scorers compute.

    Raises:
        InvalidOption: it names nothing that is known.
        MissingDependency: a scorer's model cannot be had.
    """
    if isinstance(spec, str):
        if spec == ShapeWorld.name:
            return ShapeWorld()
        if ":" in spec:
            return _imported(spec, where)
        raise InvalidOption(f"there is no objective {spec!r}", where, nearest(spec, [ShapeWorld.name, *_WITH_OPTIONS]))
    if not isinstance(spec, Mapping) or len(spec) != 1:
        raise InvalidOption(f"{spec!r} names no objective", where, "write one name, or one name and its options")
    ((name, options),) = spec.items()
    if name == "harmonic" and isinstance(options, list) and len(options) > 1:
        return Harmonic(tuple(build(o, where, device) for o in options))
    if name == "thresholding" and isinstance(options, Mapping) and set(options) == {"by", "floors"}:
        floors = tuple((build(o, where, device), float(floor)) for o, floor in options["floors"])
        return Thresholding(build(options["by"], where, device), floors)
    if name in ("clip", "pickscore", "aesthetic"):
        from patchkit.recipes.headhunter import scorers

        given = dict(options) if isinstance(options, Mapping) else {"id": options}
        if isinstance(given.get("id"), str) and set(given) <= {"id", "template"}:
            made: Objective = getattr(scorers, name)(given.pop("id"), device=device, **given)
            return made
    raise InvalidOption(
        f"{spec!r} names no objective", where, nearest(str(name), [ShapeWorld.name, *_WITH_OPTIONS]) + "; see `build`"
    )


_WITH_OPTIONS = ("clip", "pickscore", "aesthetic", "harmonic", "thresholding")


def _imported(spec: str, where: str) -> Objective:
    module, _, name = spec.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise InvalidOption(
            f"cannot import {spec!r}: {error}", where, "write module:function, importable here"
        ) from None
    if not callable(found):
        raise InvalidOption(f"{spec!r} is no function", where, "give a function (image, prompt) -> number")
    objective: Objective = found
    return objective
