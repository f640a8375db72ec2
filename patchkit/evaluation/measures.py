"""Everything that is measured on one finished sample. The same pixels always give the same figures."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from patchkit import media, metrics
from patchkit.errors import InvalidOption
from patchkit.evaluation import temporal
from patchkit.evaluation.learned import Learned
from patchkit.zoo.worlds import World

MARGIN = 2  # pixels that belong to an object beyond what its detector marks, as its outline is soft


@dataclass(frozen=True)
class Result:
    """What one call made: the first item only.

    Attributes:
        kind: ``"video"``, ``"image"`` or ``"text"``.
        pixels: (F, 3, H, W) bytes, as they are stored and shown; None for text.
        text: of a language model.
    """

    kind: str
    pixels: Tensor | None = None
    text: str = ""

    @property
    def clip(self) -> Tensor:
        """(F, 3, H, W) in [0, 1]."""
        return media.as_tensor(self.pixels)


def result_of(kind: str, item: Any) -> Result:
    """What a pipeline returned, in bytes: that is what files hold and people see."""
    if kind == "text":
        return Result(kind, text=str(item))
    return Result(kind, (media.as_tensor(item) * 255).round().to(torch.uint8))


def figures(
    result: Result,
    dense: Result | None,
    prompt: str,
    world: World | None,
    learned: Learned,
    edit: tuple[Tensor | None, Tensor | None] = (None, None),
) -> dict[str, Any]:
    """All figures of one sample.

    Args:
        result: the sample.
        dense: the unpatched one from the same seed; None if ``result`` is that one.
        prompt: what was asked for.
        world: whose detectors read the result, if there are any.
        learned: networks that score it.
        edit: the source of an edit and the mask of what it may change, where there are such.

    Returns:
        ``values`` (name -> number), ``verdict`` of the detectors or None, ``identical`` (to dense) and ``notes``.
    """
    out: dict[str, Any] = {"values": {}, "verdict": None, "notes": {}}
    if result.kind == "text":
        if dense is not None:
            out["identical"] = result.text == dense.text
        return out
    clip = result.clip
    values: dict[str, float] = out["values"]
    out["verdict"] = _verdict(clip, prompt, world)
    if result.kind == "video":
        values |= temporal.figures(clip)
    other = None
    if dense is not None:
        same = dense.pixels is not None and dense.pixels.shape == clip.shape
        other = dense.clip if same else None
        if other is None:
            out["notes"]["psnr"] = "the sizes differ"
        else:
            out["identical"] = bool(torch.equal(result.pixels, dense.pixels))  # type: ignore[arg-type]
            values |= _distances(clip, other)
    values |= _outside(clip, other, world, edit, out["notes"])
    values |= learned.figures(clip, other, prompt)
    out["values"] = {name: value for name, value in values.items() if math.isfinite(value)}
    return out


def _verdict(clip: Tensor, prompt: str, world: World | None) -> dict[str, Any] | None:
    if world is None:
        return None
    try:
        return world.judge(clip, prompt).to_dict()
    except ValueError:  # a free prompt: nothing to judge by
        return None


def _distances(clip: Tensor, dense: Tensor) -> dict[str, float]:
    out = {"psnr": metrics.psnr(dense, clip)}  # infinite where they are equal: left out, and `identical` says so
    with contextlib.suppress(InvalidOption):  # smaller than the window of SSIM
        out["ssim"] = metrics.ssim(dense, clip)
    return out


def _outside(
    clip: Tensor,
    dense: Tensor | None,
    world: World | None,
    edit: tuple[Tensor | None, Tensor | None],
    notes: dict[str, Any],
) -> dict[str, float]:
    """What is kept outside a mask: of an edit's source, else of the dense result; around the objects of both."""
    source, mask = edit
    reference = dense if source is None else source
    if reference is None:
        return {}
    if reference.shape != clip.shape:
        if reference.shape[0] != 1 or reference.shape[1:] != clip.shape[1:]:
            notes["outside"] = f"the source is {_size(reference)}, the result {_size(clip)}"
            return {}
        reference = reference.expand_as(clip)  # a picture that is kept through a video
    if mask is None and world is not None:
        found = [world.objects(reference), world.objects(clip)]
        if found[0] is not None and found[1] is not None:
            mask = _grown(found[0]) | _grown(found[1])
    if mask is None:
        return {}
    try:
        found_outside = metrics.outside(reference, clip, mask)
    except InvalidOption as error:
        notes["outside"] = error.what
        return {}
    return {"outside_psnr": found_outside["psnr"], "outside_mae": found_outside["mae"] * 255}


def _grown(mask: Tensor) -> Tensor:
    return F.max_pool2d(mask[:, None].float(), 2 * MARGIN + 1, stride=1, padding=MARGIN)[:, 0] > 0.5


def _size(clip: Tensor) -> str:
    frames, _, height, width = clip.shape
    return f"{frames} x {height} x {width}"


def read_edit(source: Path | None, mask: Path | None, shape: tuple[int, ...]) -> tuple[Tensor | None, Tensor | None]:
    """The source and mask of an edit as tensors; the mask is scaled to the result's size."""
    picture = None if source is None else media.as_tensor(_read(source))
    if mask is None:
        return picture, None
    gray = media.as_tensor(_read(mask)).mean(dim=1, keepdim=True)
    return picture, F.interpolate(gray, size=shape[-2:], mode="nearest")[:, 0] > 0.5


def _read(path: Path) -> Any:
    from diffusers.utils import load_image, load_video

    from patchkit.runs.calls import IMAGE_SUFFIXES

    reader = load_image if path.suffix.lower() in IMAGE_SUFFIXES else load_video
    try:
        return reader(str(path))
    except (OSError, ValueError) as error:
        raise InvalidOption(f"cannot read {path}: {error}", str(path), "give a picture or video") from None


def costs(made: Any, memory: Any, evaluations: Any) -> Mapping[str, float]:
    """Seconds, memory and evaluations of a call, by name; what could not be measured is absent."""
    counted = evaluations.to_dict()
    out = {"seconds": made.seconds, "evaluations": counted["calls"], "evaluated_samples": counted["samples"]}
    peak = made.memory if made.memory is not None else memory.bytes
    return out if peak is None else out | {"peak_memory": float(peak)}
