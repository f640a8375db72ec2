"""What differs between diffusers' denoisers, as data: one entry a model class.

Kinds cannot be read off uniformly (``is_cross_attention`` is missing on several classes and joint attention says
False), so each class lists patterns over module names. The first that matches counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from patchkit.context import Grid
from patchkit.sites import Kind, Side

Inputs = dict[str, Any]
Rule = tuple[str, Kind, Side | None]


@dataclass(frozen=True)
class Denoiser:
    """How one denoiser class is built.

    Attributes:
        pipeline: short name, as recipes list the models they support.
        rules: (regular expression for the full module name, kind, side of the text in a joint sequence).
        grid: reads the shape of the visual tokens from the module and its inputs.
        blocks: prefixes in the order in which they run, where that is not the order of definition.
        ignore: attention that no selection means (text refiners).
        chained: whether each block of a list hands what it returns to the next one and to nothing else.
    """

    pipeline: str
    rules: tuple[Rule, ...]
    grid: Callable[[Any, Inputs], Grid | None]
    blocks: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    chained: bool = True


def _up(length: int, patch: int | None) -> int:
    return -(-length // (patch or 1))


def _image(module: Any, inputs: Inputs) -> Grid:
    """(B, C, h, w)."""
    height, width = inputs["hidden_states"].shape[-2:]
    patch = module.config.patch_size
    return Grid(1, height // patch, width // patch)


def _unet(module: Any, inputs: Inputs) -> Grid:
    """(B, C, h, w) at full size; each attention finds its own level by its token count."""
    height, width = inputs["sample"].shape[-2:]
    return Grid(1, height, width)


def _channels_first_video(module: Any, inputs: Inputs) -> Grid:
    """(B, C, F, h, w)."""
    frames, height, width = inputs["hidden_states"].shape[-3:]
    patch = module.config.patch_size
    time = getattr(module.config, "patch_size_t", None)
    if isinstance(patch, list | tuple):
        time, patch = patch[0], patch[1]
    return Grid(_up(frames, time), height // patch, width // patch)


def _cogvideox(module: Any, inputs: Inputs) -> Grid:
    """(B, F, C, h, w)."""
    frames, _, height, width = inputs["hidden_states"].shape[1:]
    patch = module.config.patch_size
    return Grid(_up(frames, module.config.patch_size_t), height // patch, width // patch)


def _flux(module: Any, inputs: Inputs) -> Grid | None:
    """Packed: the position ids say the shape."""
    ids = inputs.get("img_ids")
    if ids is None:
        return None
    ids = ids[0] if ids.ndim == 3 else ids
    height, width = (ids[:, 1:].amax(0) + 1).tolist()
    return Grid(1, int(height), int(width))


def _ltx(module: Any, inputs: Inputs) -> Grid | None:
    """Packed: told by arguments."""
    sizes = [inputs.get(name) for name in ("num_frames", "height", "width")]
    return Grid(*(int(s) for s in sizes)) if None not in sizes else None  # type: ignore[arg-type]


def _qwen(module: Any, inputs: Inputs) -> Grid | None:
    """Packed: told by an argument, a list of (F, h, w) for each sample."""
    shapes = inputs.get("img_shapes")
    if not shapes:
        return None
    first = shapes[0][0] if isinstance(shapes[0], list) else shapes[0]
    return Grid(*(int(s) for s in first))


_SELF_CROSS: tuple[Rule, ...] = ((r".*\.attn1", "self", None), (r".*\.attn2", "cross", None))
_UNET = ("down_blocks", "mid_block", "up_blocks")

DENOISERS: dict[str, Denoiser] = {
    "UNet2DConditionModel": Denoiser("sd", (*_SELF_CROSS, (r".*", "self", None)), _unet, _UNET, chained=False),
    "SD3Transformer2DModel": Denoiser("sd3", ((r".*\.attn", "joint", "last"), (r".*\.attn2", "self", None)), _image),
    "FluxTransformer2DModel": Denoiser("flux", ((r".*\.attn", "joint", "first"),), _flux),
    "PixArtTransformer2DModel": Denoiser("pixart", _SELF_CROSS, _image),
    "SanaTransformer2DModel": Denoiser("sana", _SELF_CROSS, _image),
    "CogVideoXTransformer3DModel": Denoiser("cogvideox", ((r".*\.attn1", "joint", "first"),), _cogvideox),
    "HunyuanVideoTransformer3DModel": Denoiser(
        "hunyuanvideo", ((r".*\.attn", "joint", "last"),), _channels_first_video, ignore=(r"context_embedder\..*",)
    ),
    "WanTransformer3DModel": Denoiser("wan", _SELF_CROSS, _channels_first_video),
    "LTXVideoTransformer3DModel": Denoiser("ltx", _SELF_CROSS, _ltx),
    "MochiTransformer3DModel": Denoiser("mochi", ((r".*\.attn1", "joint", "last"),), _channels_first_video),
    "QwenImageTransformer2DModel": Denoiser("qwenimage", ((r".*\.attn", "joint", "first"),), _qwen),
}
