"""What a zoo model draws, as a benchmark needs it: prompts that are always the same, and what a result shows of them.

A :class:`World` belongs to each model (:func:`of`). Its prompts are balanced: whatever their number, every colour,
shape, background and so on comes about equally often.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from patchkit.media import as_tensor
from patchkit.zoo import detect, detect_stills, stills, world

POOL = 400  # of the many things that a grammar can say, so many are looked at


@dataclass(frozen=True)
class Verdict:
    """What the detectors read from one result.

    Attributes:
        right: attribute -> is it as the prompt asks?
        objects: one entry for each object that was asked for: what was asked for, and what of it is right.
        read: attribute -> what was read, in words.
    """

    right: dict[str, bool]
    objects: list[dict[str, Any]]
    read: dict[str, str]

    @property
    def all(self) -> bool:
        """Everything is right."""
        return all(self.right.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"right": self.right, "all": self.all, "objects": self.objects, "read": self.read}


@dataclass(frozen=True)
class World:
    """Prompts and judge of the models that draw one world.

    Attributes:
        name: how messages call it.
        kind: of results: ``"video"`` or ``"image"``.
        attributes: what a prompt can speak of, in the order in which they are shown.
        prompts: the first n prompts of the fixed set.
        size: how many there are.
        judge: (result, prompt) -> verdict; raises ``ValueError`` for a prompt that is no caption of this world.
        objects: (F, H, W) mask of the objects in a result, None if nothing clear is seen.
    """

    name: str
    kind: str
    attributes: tuple[str, ...]
    prompts: Callable[[int], tuple[str, ...]]
    size: int
    judge: Callable[[Any, str], Verdict]
    objects: Callable[[Any], Tensor | None]


def of(name: str) -> World | None:
    """The world of a zoo model, or None where there are no detectors for it."""
    return _WORLDS.get(name.removeprefix("zoo/"))


def balanced(pool: Sequence[tuple[str, tuple[str, ...]]], count: int) -> list[str]:
    """``count`` texts of a pool of (text, its words), chosen one by one: each time the one with the rarest words."""
    used: Counter[tuple[int, str]] = Counter()
    rest, chosen = list(pool), []
    for _ in range(count):
        best = min(range(len(rest)), key=lambda i: sum(used[pair] for pair in enumerate(rest[i][1])))
        text, words = rest.pop(best)
        used.update(enumerate(words))
        chosen.append(text)
    return chosen


# --- clips: one object that moves -----------------------------------------------------------------------------


@cache
def _clip_prompts(count: int) -> tuple[str, ...]:
    combinations = world.combinations()
    random.Random("shape world, clips").shuffle(combinations)
    return tuple(balanced([(world.Scene(*c).caption, c) for c in combinations], count))


def _judge_clip(video: Any, prompt: str) -> Verdict:
    wanted = detect.Attributes.of_prompt(prompt)
    read = detect.detect(video)
    right = read.right(wanted)
    entry = {"wanted": f"{wanted.colour} {wanted.shape}", "found": read.present >= detect.MIN_PRESENT}
    entry |= {"colour": right["colour"], "shape": right["shape"]}
    return Verdict(right, [entry], {name: getattr(read, name) for name in detect.ATTRIBUTES})


def _clip_objects(video: Any) -> Tensor | None:
    clip = as_tensor(video)
    if detect.detect(clip).present < detect.MIN_PRESENT:
        return None
    return detect._object_mask(clip, detect._ring(clip).median(dim=0).values)


# --- stills: one or two objects -------------------------------------------------------------------------------


@cache
def _still_prompts(count: int) -> tuple[str, ...]:
    """One and two objects by turns, of what the training knows, with their places said."""
    rng = random.Random("shape world, stills")
    halves = []
    for number, length in ((1, (count + 1) // 2), (2, count // 2)):
        known = [d for d in stills.descriptions(number) if not d.held_out and d.position]
        pool = rng.sample(known, min(POOL, len(known)))
        halves.append(balanced([(d.caption, _words(d)) for d in pool], length))
    return tuple(halves[i % 2][i // 2] for i in range(count))


def _words(description: stills.Description) -> tuple[str, ...]:
    items = [word for item in description.items for word in (item.colour, item.shape)]
    return (description.background, description.position or "", *items)


def _judge_still(picture: Any, prompt: str) -> Verdict:
    wanted = stills.Description.parse(prompt)
    read = detect_stills.detect(picture)
    objects = []
    for found, item in zip(read.match(wanted), wanted.items, strict=True):
        entry = {"wanted": f"{item.colour} {item.shape}", "found": found is not None}
        entry["colour"] = found is not None and found.colour == item.colour
        entry["shape"] = found is not None and found.shape == item.shape
        objects.append(entry)
    seen = ", ".join(f"{o.colour} {o.shape}" for o in read.objects) or detect.NONE
    return Verdict(read.right(wanted), objects, {"background": read.background, "objects": seen})


def _still_objects(picture: Any) -> Tensor | None:
    found = detect_stills.detect(picture).objects
    return torch.stack([o.mask for o in found]).any(dim=0)[None] if found else None


_CLIPS = World(
    name="clips of the shape world",
    kind="video",
    attributes=detect.ATTRIBUTES,
    prompts=_clip_prompts,
    size=len(world.combinations()),
    judge=_judge_clip,
    objects=_clip_objects,
)
_STILLS = World(
    name="stills of the shape world",
    kind="image",
    attributes=detect_stills.ATTRIBUTES,
    prompts=_still_prompts,
    size=2 * POOL,
    judge=_judge_still,
    objects=_still_objects,
)
_WORLDS = {"video": _CLIPS, "image": _STILLS, "dit": _STILLS, "flux": _STILLS}
