"""Pictures and short animations as text that stands inside a page."""

from __future__ import annotations

import base64
import io
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SMALL = 128  # up to this side, single pixels are shown
LARGE = 320
GAIN = 4  # of difference pictures
FRAME_MILLISECONDS = 125


def animation(clip: Tensor) -> str:
    """A looping animation of (F, 3, H, W) bytes or [0, 1], or a still picture if there is one frame."""
    if len(clip) == 1 and max(clip.shape[-2:]) <= SMALL:
        return _encoded(_images(clip)[0], "png", optimize=True)
    if max(clip.shape[-2:]) <= SMALL:  # compression halves the resolution of colours: that must not be seen
        clip = clip.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)
    frames = _images(clip)
    more = {"save_all": True, "append_images": frames[1:], "duration": FRAME_MILLISECONDS, "loop": 0}
    moving = more if len(frames) > 1 else {}
    if _has_webp():
        return _encoded(frames[0], "webp", quality=80, method=4, **moving)
    return _encoded(frames[0], "gif" if moving else "png", **moving)


def difference(clip: Tensor, reference: Tensor) -> str:
    """Where two results of one shape differ: absolute difference, over channels and frames the mean, times 4."""
    far = (_unit(clip) - _unit(reference)).abs().mean(dim=(0, 1))
    gray = (GAIN * far).clamp(0, 1).expand(1, 3, *far.shape)
    return _encoded(_images(gray)[0].convert("L"), "png", optimize=True)


def still(picture: Any) -> str:
    """A picture that is drawn, not measured."""
    picture = picture.convert("RGB")
    picture.thumbnail((LARGE, LARGE))
    return _encoded(picture, "png", optimize=True)


def _images(clip: Tensor) -> list[Any]:
    from PIL import Image

    pixels = _unit(clip)
    largest = max(pixels.shape[-2:])
    if largest > LARGE:
        sides = [max(1, round(side * LARGE / largest)) for side in pixels.shape[-2:]]
        pixels = F.interpolate(pixels, size=sides, mode="bilinear", antialias=True)
    arrays = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(array) for array in arrays]


def _unit(clip: Tensor) -> Tensor:
    return clip.float() / 255 if clip.dtype == torch.uint8 else clip.float().clamp(0, 1)


def _has_webp() -> bool:
    from PIL import features

    return bool(features.check("webp"))


def _encoded(image: Any, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=kind.upper(), **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
