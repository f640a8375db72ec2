"""Objectives that are networks: CLIP similarity, PickScore, and aesthetics by a head on CLIP's image features.

None ships with patchkit. Each is loaded by folder or hub id through transformers; what cannot be had is an error with
the remedy, never a zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchkit.errors import MissingDependency
from patchkit.media import as_tensor

_MEAN, _DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's own


@dataclass(frozen=True)
class Similarity:
    """How near picture and prompt are in CLIP's space.

    Args:
        model: a ``CLIPModel``.
        tokenizer: its tokenizer.
        name: what stores and presets call it.
        factor: of the cosine; None: the model's own scale, as PickScore has it.
        template: what is compared with the picture; ``{prompt}`` stands for the prompt.
    """

    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    name: str
    factor: float | None = 100.0
    template: str = "{prompt}"

    @torch.no_grad()
    def __call__(self, image: Any, prompt: str) -> float:
        """Of one picture, or the mean over the frames of a clip."""
        text = self.template.replace("{prompt}", prompt)
        device = self.model.device
        tokens = self.tokenizer(text, return_tensors="pt", truncation=True).to(device)
        words = _features(self.model.get_text_features(**tokens))
        pixels = prepared(image, self.model.config.vision_config.image_size).to(device, self.model.dtype)
        seen = _features(self.model.get_image_features(pixel_values=pixels))
        factor = float(self.model.logit_scale.exp()) if self.factor is None else self.factor
        return factor * float(F.cosine_similarity(seen.float(), words.float()).mean())


@dataclass(frozen=True)
class Aesthetic:
    """What people would say of the picture, 1 to 10, by linear layers on CLIP's normalised image features.

    Args:
        vision: a ``CLIPVisionModelWithProjection``.
        head: (n, D) features -> (n, 1).
        name: what stores and presets call it.
    """

    vision: Any = field(repr=False)
    head: nn.Module = field(repr=False)
    name: str

    @torch.no_grad()
    def __call__(self, image: Any, prompt: str) -> float:
        """Of one picture, or the mean over the frames of a clip; the prompt does not matter."""
        pixels = prepared(image, self.vision.config.image_size).to(self.vision.device, self.vision.dtype)
        found = F.normalize(self.vision(pixel_values=pixels).image_embeds.float(), dim=-1)
        return float(self.head(found).mean())


def clip(id: str, device: str = "cpu", template: str = "{prompt}") -> Similarity:
    """The CLIP score, 100 x cosine. The paper's prompt is ``"A photo depicts {prompt}"``."""
    return Similarity(*_pair(id, device), name=f"clip {id}", template=template)


def pickscore(id: str, device: str = "cpu", template: str = "{prompt}") -> Similarity:
    """PickScore (arXiv 2305.01569), such as ``yuvalkirstain/PickScore_v1``: a CLIP trained on choices of people."""
    return Similarity(*_pair(id, device), name=f"pickscore {id}", factor=None, template=template)


def aesthetic(id: str, device: str = "cpu") -> Aesthetic:
    """A LAION aesthetic predictor saved with its CLIP: ``shunk031/aesthetics-predictor-v1-vit-large-patch14``."""
    from transformers import CLIPVisionModelWithProjection

    vision: Any = _load(id, lambda: CLIPVisionModelWithProjection.from_pretrained(id))
    head = _load(id, lambda: _head(id))
    return Aesthetic(vision.to(device).eval(), head.to(device).eval(), name=f"aesthetic {id}")


def prepared(image: Any, size: int) -> Tensor:
    """(frames, 3, size, size) as CLIP wants it: the shorter side scaled to ``size``, a square from the middle."""
    frames = as_tensor(image)
    scale = size / min(frames.shape[-2:])
    sides = [max(size, round(side * scale)) for side in frames.shape[-2:]]
    pixels = F.interpolate(frames, size=sides, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = ((side - size) // 2 for side in sides)
    pixels = pixels[..., top : top + size, left : left + size]
    return (pixels - torch.tensor(_MEAN).view(3, 1, 1)) / torch.tensor(_DEVIATION).view(3, 1, 1)


def _pair(id: str, device: str) -> tuple[Any, Any]:
    from transformers import AutoTokenizer, CLIPModel

    model: Any = _load(id, lambda: CLIPModel.from_pretrained(id))
    return model.to(device).eval(), _load(id, lambda: AutoTokenizer.from_pretrained(id))


def _head(id: str) -> nn.Sequential:
    """The linear layers beside the vision model: ``predictor`` or ``layers.N``; dropout between them is left out."""
    from safetensors.torch import load_file
    from transformers.utils import cached_file

    weights = load_file(str(cached_file(id, "model.safetensors")))
    names = [n.removesuffix(".weight") for n in weights if n.startswith(("predictor", "layers.")) and "weight" in n]
    if not names:
        raise ValueError("it has no layers called predictor or layers.N")
    linear = []
    for name in sorted(names, key=lambda n: int(n.rpartition(".")[2]) if "." in n else 0):
        weight, bias = weights[f"{name}.weight"].float(), weights[f"{name}.bias"].float()
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        linear.append(layer)
    return nn.Sequential(*linear)


def _load(id: str, loader: Callable[[], Any]) -> Any:
    try:
        return loader()
    except Exception as error:  # the libraries raise whatever their own parts raise
        text = " ".join(str(error).split())[:200] or type(error).__name__
        raise MissingDependency(
            f"the scorer's model could not be loaded: {text}",
            id,
            "give a folder, or a hub id that can be reached; any function (image, prompt) -> number will do instead",
        ) from None


def _features(found: Any) -> Tensor:
    """Newer releases of transformers wrap the features."""
    return found if isinstance(found, Tensor) else found.pooler_output
