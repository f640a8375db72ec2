"""Scores by networks: LPIPS, and CLIP or DINO features. None ships with patchkit; each says what it needs.

A score that cannot be had is absent, with the reason beside it. It is never a zero.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from patchkit.errors import InvalidOption

LPIPS_MISSING = 'pip install "patchkit[metrics]"'
CLIP_MISSING = "give --clip FOLDER or a hub id, such as openai/clip-vit-base-patch32"
DINO_MISSING = "give --dino FOLDER or a hub id, such as facebook/dinov2-small"
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for models that do not say theirs
_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's
BATCH = 32


@dataclass
class Learned:
    """The networks of one run.

    Attributes:
        functions: score -> function of (clip, reference, prompt) that gives figures by name.
        missing: figure -> what to do to have it.
    """

    functions: list[Callable[[Tensor, Tensor | None, str], dict[str, float]]] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    def figures(self, clip: Tensor, reference: Tensor | None, prompt: str) -> dict[str, float]:
        """All scores of one result, (F, 3, H, W) in [0, 1]; ``reference`` is the unpatched one."""
        out: dict[str, float] = {}
        for function in self.functions:
            out |= function(clip, reference, prompt)
        return out


def prepare(clip: str | None, dino: str | None, device: str) -> Learned:
    """Load what there is.

    Args:
        clip: folder or hub id of a CLIP model of transformers, or None.
        dino: folder or hub id of a vision model of transformers, such as DINOv2, or None.
        device: where they compute.

    Raises:
        InvalidOption: a model that was asked for cannot be loaded.
    """
    found = Learned()
    _add_lpips(found, device)
    if clip is None:
        found.missing |= {"clip_text": CLIP_MISSING, "clip_frames": CLIP_MISSING}
    else:
        found.functions.append(_clip(clip, device))
    if dino is None:
        found.missing["dino_frames"] = DINO_MISSING
    else:
        found.functions.append(_dino(dino, device))
    return found


def _add_lpips(found: Learned, device: str) -> None:
    try:
        module = importlib.import_module("lpips")
    except ImportError:
        found.missing["lpips"] = LPIPS_MISSING
        return
    try:
        network = module.LPIPS(net="alex", verbose=False).to(device).eval()
    except Exception as error:  # it fetches AlexNet's weights over the network, whose errors are of every kind
        found.missing["lpips"] = f"lpips is installed, but its network could not be loaded: {_short(error)}"
        return

    def score(clip: Tensor, reference: Tensor | None, prompt: str) -> dict[str, float]:
        if reference is None or reference.shape != clip.shape:
            return {}
        total = 0.0
        for start in range(0, len(clip), BATCH):
            a, b = (v[start : start + BATCH].to(device) * 2 - 1 for v in (reference, clip))
            with torch.no_grad():
                total += float(network(a, b).sum())
        return {"lpips": total / len(clip)}

    found.functions.append(score)


def _load(name: str, flag: str, loader: Callable[[], Any]) -> Any:
    try:
        return loader()
    except Exception as error:  # the libraries raise whatever their own parts raise
        raise InvalidOption(
            f"the model could not be loaded: {_short(error)}", f"{flag} {name}", "give a folder or a hub id"
        ) from None


def _clip(name: str, device: str) -> Callable[[Tensor, Tensor | None, str], dict[str, float]]:
    from transformers import CLIPModel, CLIPTokenizer

    model: Any = _load(name, "--clip", lambda: CLIPModel.from_pretrained(name)).to(device).eval()
    tokenizer: Any = _load(name, "--clip", lambda: CLIPTokenizer.from_pretrained(name))
    size = model.config.vision_config.image_size
    mean, deviation = _normalisation(name)

    def score(clip: Tensor, reference: Tensor | None, prompt: str) -> dict[str, float]:
        tokens = tokenizer(prompt, return_tensors="pt", truncation=True).to(device)
        with torch.no_grad():
            text = _features(model.get_text_features(**tokens))
        frames = _encode(
            clip, size, mean, deviation, lambda pixels: _features(model.get_image_features(pixel_values=pixels)), device
        )
        out = {"clip_text": float(F.cosine_similarity(frames, text.float().cpu()).mean())}
        return out | _adjacent(frames, "clip_frames")

    return score


def clip_frames(name: str, device: str = "cpu") -> Callable[[Tensor], Tensor]:
    """A function that gives the features of a video's frames for :func:`patchkit.evaluation.temporal.cscv`.

    They are what DiTCtrl (arXiv 2412.18597) measures with: the pooled output of CLIP's vision tower, before the
    projection to the space that it shares with text. Frames are scaled to the tower's size on their shorter side and
    cut to a square in the middle.

    Args:
        name: folder or hub id of a CLIP model of transformers, whole or its vision tower; the paper has ViT-B/32.
        device: where it computes.

    Returns:
        (F, 3, H, W) in [0, 1] -> (F, D) on the CPU.

    Raises:
        InvalidOption: the model cannot be loaded.
    """
    from transformers import CLIPVisionModel

    model: Any = _load(name, "--clip", lambda: CLIPVisionModel.from_pretrained(name)).to(device).eval()
    mean, deviation = _normalisation(name, _CLIP)

    def features(clip: Tensor) -> Tensor:
        size = model.config.image_size
        return _encode(clip, size, mean, deviation, lambda x: model(pixel_values=x).pooler_output, device)

    return features


def _dino(name: str, device: str) -> Callable[[Tensor, Tensor | None, str], dict[str, float]]:
    from transformers import AutoModel

    model: Any = _load(name, "--dino", lambda: AutoModel.from_pretrained(name)).to(device).eval()
    mean, deviation = _normalisation(name)
    size = 224 if getattr(model.config, "model_type", "").startswith("dino") else model.config.image_size

    def score(clip: Tensor, reference: Tensor | None, prompt: str) -> dict[str, float]:
        frames = _encode(
            clip, size, mean, deviation, lambda pixels: model(pixel_values=pixels).last_hidden_state[:, 0], device
        )
        return _adjacent(frames, "dino_frames")

    return score


def _features(found: Any) -> Tensor:
    """Newer releases of transformers wrap the features."""
    return found if isinstance(found, Tensor) else found.pooler_output


def _encode(
    clip: Tensor,
    size: int,
    mean: tuple[float, ...],
    deviation: tuple[float, ...],
    model: Callable[[Tensor], Tensor],
    device: str,
) -> Tensor:
    """(F, D) features of frames that are scaled to ``size`` on their shorter side and cut to a square."""
    scale = size / min(clip.shape[-2:])
    sides = [max(size, round(side * scale)) for side in clip.shape[-2:]]
    pixels = F.interpolate(clip, size=sides, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = ((side - size) // 2 for side in sides)
    pixels = pixels[..., top : top + size, left : left + size]
    pixels = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(deviation).view(3, 1, 1)
    with torch.no_grad():
        parts = [model(pixels[i : i + BATCH].to(device)).float().cpu() for i in range(0, len(pixels), BATCH)]
    return torch.cat(parts)


def _adjacent(frames: Tensor, name: str) -> dict[str, float]:
    return {name: float(F.cosine_similarity(frames[1:], frames[:-1]).mean())} if len(frames) > 1 else {}


def _normalisation(
    name: str, default: tuple[tuple[float, ...], tuple[float, ...]] = (_MEAN, _DEVIATION)
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What the model's own preprocessing says, where it says something."""
    import json

    path = Path(name) / "preprocessor_config.json"
    if not path.is_file():
        try:
            from transformers.utils import cached_file

            found = cached_file(name, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
        except (OSError, ValueError):
            found = None
        if found is None:
            return default
        path = Path(found)
    said = json.loads(path.read_text(encoding="utf-8"))
    return tuple(said.get("image_mean", default[0])), tuple(said.get("image_std", default[1]))


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
