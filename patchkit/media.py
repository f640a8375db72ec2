"""Reading frames from whatever pipelines return, and writing videos, animations and pictures.

Files appear whole or not at all: they are written under a temporary name in the same folder and renamed. Tiny videos
are enlarged by a whole factor, without smoothing, so that people can see them.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from patchkit.errors import InvalidOption, MissingDependency

if TYPE_CHECKING:
    from PIL.Image import Image

VISIBLE = 256  # the shorter side that tiny pictures are enlarged to, about
_BAR = 22  # height of a label, pixels


def as_tensor(frames: Any) -> Tensor:
    """Frames as (F, 3, H, W) fp32 in [0, 1], from all that pipelines return.

    Args:
        frames: a (F, 3, H, W) or (3, H, W) tensor, a (F, H, W, 3) or (H, W, 3) array, a PIL image, or a list of any
            of these; floats in [0, 1] or bytes.
    """
    if isinstance(frames, (list, tuple)):
        if not frames:
            raise InvalidOption("no frames")
        return torch.cat([as_tensor(frame) for frame in frames])
    if isinstance(frames, Tensor):
        pixels = frames.detach().cpu()
    else:
        pixels = torch.from_numpy(np.array(frames.convert("RGB") if hasattr(frames, "convert") else frames))
        if pixels.ndim in (3, 4) and pixels.shape[-1] == 3:
            pixels = pixels.movedim(-1, -3)
    if pixels.ndim == 3:
        pixels = pixels[None]
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise InvalidOption(
            f"not a video: shape {tuple(pixels.shape)}",
            remedy="give a (F, 3, H, W) tensor, a (F, H, W, 3) array or a list of PIL images",
        )
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float().clamp(0, 1)


def enlarge(frames: Tensor, scale: int | None = None) -> Tensor:
    """Repeat pixels ``scale`` times both ways; None picks the factor that makes the shorter side about 256."""
    if scale is None:
        scale = max(1, VISIBLE // min(frames.shape[-2:]))
    if scale < 1:
        raise InvalidOption(f"scale must be a whole number from 1, not {scale}")
    return frames.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)


def save(frames: Any, path: str | Path, fps: int = 8, scale: int | None = None) -> Path:
    """Write frames in the form that the name's suffix asks for.

    ``.mp4`` and ``.gif`` move. ``.png`` and ``.jpg`` hold a single frame as it is, and of several frames a contact
    sheet. A name without suffix becomes a folder of numbered PNG files.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind == ".mp4":
        return save_video(frames, path, fps, scale)
    if kind == ".gif":
        return save_gif(frames, path, fps, scale)
    if kind in (".png", ".jpg", ".jpeg"):
        clip = as_tensor(frames)
        return save_image(clip if len(clip) == 1 else contact_sheet({"": clip}, scale=scale), path, scale)
    if not kind:
        for index, frame in enumerate(as_tensor(frames)):
            save_image(frame, path / f"{index:04d}.png", scale)
        return path
    raise InvalidOption(f"no way to write frames as {kind!r}", str(path), "use .mp4, .gif, .png, .jpg, or a folder")


def save_video(frames: Any, path: str | Path, fps: int = 8, scale: int | None = None) -> Path:
    """Write an mp4 (H.264); needs the extra ``video``."""
    _check_fps(fps)
    try:
        import imageio.v2 as imageio
        import imageio_ffmpeg  # noqa: F401  imageio looks for it only when the first frame is written
    except ImportError as error:
        raise MissingDependency(
            "writing mp4 needs imageio and imageio-ffmpeg", str(path), "pip install 'patchkit[video]', or write a .gif"
        ) from error
    pixels = _bytes(_even(enlarge(as_tensor(frames), scale)))
    with replacing(path) as part:
        options = ["-preset", "slow", "-crf", "14"]
        writer: Any = imageio.get_writer(
            part, format="FFMPEG", fps=fps, codec="libx264", macro_block_size=1, output_params=options
        )
        with writer:
            for frame in pixels:
                writer.append_data(frame)
    return Path(path)


def save_gif(frames: Any, path: str | Path, fps: int = 8, scale: int | None = None) -> Path:
    """Write an endlessly repeated GIF."""
    from PIL import Image

    _check_fps(fps)
    images = [Image.fromarray(frame) for frame in _bytes(enlarge(as_tensor(frames), scale))]
    with replacing(path) as part:
        images[0].save(part, format="GIF", save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
    return Path(path)


def save_image(image: Any, path: str | Path, scale: int | None = None) -> Path:
    """Write one picture, in the format of its suffix."""
    clip = as_tensor(image)
    if len(clip) != 1:
        raise InvalidOption(f"one picture expected, {len(clip)} given", str(path), "use save() or contact_sheet()")
    with replacing(path) as part:
        _image(enlarge(clip, scale)[0]).save(part)
    return Path(path)


def side_by_side(videos: Mapping[str, Any], scale: int | None = None) -> Tensor:
    """One video of several, each under its label; a shorter one waits on its last frame."""
    clips = {label: enlarge(as_tensor(frames), scale) for label, frames in videos.items()}
    if len({clip.shape[-2:] for clip in clips.values()}) != 1:
        raise InvalidOption("the videos have different sizes, or there is none")
    length = max(len(clip) for clip in clips.values())
    columns = []
    for label, clip in clips.items():
        clip = torch.cat([clip, clip[-1:].expand(length - len(clip), -1, -1, -1)])
        bar = _label(label, clip.shape[-1]).expand(length, -1, -1, -1)
        columns.append(torch.cat([bar, clip], dim=2))
    return torch.cat(_with_gaps(columns, 3), dim=3)


def contact_sheet(videos: Mapping[str, Any], columns: int = 9, scale: int | None = None) -> Tensor:
    """A (3, H, W) picture with one labelled row a video, ``columns`` frames of it evenly spread over its time."""
    rows = []
    for label, frames in videos.items():
        clip = as_tensor(frames)
        chosen = torch.linspace(0, len(clip) - 1, min(columns, len(clip))).round().long()
        factor = scale if scale is not None else max(1, VISIBLE // 2 // min(clip.shape[-2:]))
        row = torch.cat(_with_gaps(list(enlarge(clip[chosen], factor)), 2), dim=2)
        rows.append(torch.cat([_label(label, row.shape[-1]), row], dim=1) if label else row)
    if not rows:
        raise InvalidOption("no videos")
    width = max(row.shape[-1] for row in rows)
    padded = [torch.nn.functional.pad(row, (0, width - row.shape[-1]), value=1.0) for row in rows]
    return torch.cat(_with_gaps(padded, 1), dim=1)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary name beside ``path`` that becomes ``path`` if the block succeeds, and vanishes if it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    part = Path(name)
    try:
        yield part
        part.chmod(0o666 & ~_umask())  # mkstemp made it private
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)  # nothing is left after success


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _with_gaps(pieces: list[Tensor], dim: int, width: int = 4) -> list[Tensor]:
    """White strips between ``pieces``."""
    shape = list(pieces[0].shape)
    shape[dim] = width
    out = [pieces[0]]
    for piece in pieces[1:]:
        out += [torch.ones(shape), piece]
    return out


def _label(text: str, width: int) -> Tensor:
    """(3, _BAR, width): black text on white, cut at the right."""
    from PIL import Image, ImageDraw, ImageFont

    bar = Image.new("RGB", (width, _BAR), "white")
    ImageDraw.Draw(bar).text((4, 3), text, fill="black", font=ImageFont.load_default(size=14))
    return as_tensor(bar)[0]


def _even(frames: Tensor) -> Tensor:
    """H.264 wants even sides: repeat the last row or column where needed."""
    pad = (0, frames.shape[-1] % 2, 0, frames.shape[-2] % 2)
    return torch.nn.functional.pad(frames, pad, mode="replicate")


def _bytes(frames: Tensor) -> np.ndarray:
    return (frames * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _image(frame: Tensor) -> Image:
    from PIL import Image

    return Image.fromarray(_bytes(frame[None])[0])


def _check_fps(fps: int) -> None:
    if fps <= 0:
        raise InvalidOption(f"fps must be positive, not {fps}")
