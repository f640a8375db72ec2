"""What differs between the video pipelines that DiTCtrl works on, as data: one entry a pipeline class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from patchkit.errors import UnsupportedModel

Arguments = Mapping[str, Any]

# argument of the denoiser -> argument of the pipeline that it comes from
PIPELINE_NAMES = {
    "encoder_hidden_states": "prompt_embeds",
    "encoder_attention_mask": "prompt_attention_mask",
    "pooled_projections": "pooled_prompt_embeds",
}


@dataclass(frozen=True)
class Model:
    """How one pipeline and its denoiser are called.

    Attributes:
        name: short name, as recipes list the models they support.
        axis: the frame axis of latents and prediction.
        texts: what the denoiser is told of a prompt, in the order in which ``encode_prompt`` gives it.
        frame_ratio: attribute of the pipeline with the pixel frames of a latent frame.
        maps: whether objects are found in the joint attention or in the cross-attention.
        zeros: whether the model knows an unconditional text of all zeros from its training.
        rotary: argument with position tables over the latents, if there is one.
        guided: whether a call asks for classifier-free guidance.
    """

    name: str
    axis: int
    texts: tuple[str, ...]
    frame_ratio: str
    maps: Literal["joint", "cross"]
    zeros: bool = False
    rotary: str | None = None
    guided: Callable[[Arguments], bool] = lambda given: (given.get("guidance_scale") or 0) > 1

    def encode(self, pipe: Any, prompt: str, given: Arguments) -> dict[str, Tensor]:
        """What the denoiser is told of one prompt, each with a batch of one."""
        options = {"max_sequence_length": given["max_sequence_length"], "device": pipe._execution_device}
        with torch.no_grad():
            found = pipe.encode_prompt(prompt=prompt, do_classifier_free_guidance=False, **options)
        return dict(zip(self.texts, found, strict=False))

    def pixel_frames(self, pipe: Any, latent: int) -> int:
        """Frames of a video of so many latent ones."""
        return int(getattr(pipe, self.frame_ratio)) * (latent - 1) + 1


MODELS: dict[str, Model] = {
    "CogVideoXPipeline": Model(
        name="cogvideox",
        axis=1,
        texts=("encoder_hidden_states",),
        frame_ratio="vae_scale_factor_temporal",
        maps="joint",
        zeros=True,
        rotary="image_rotary_emb",
    ),
}

# pipelines that are known not to work, and why
REFUSED = {
    "ImageToVideo": "the first frame is given, and only the first segment would begin with it",
    "VideoToVideo": "it starts from a given video of one segment's length",
    "FunControl": "its control video is of one segment's length",
    "VACE": "its control video is of one segment's length",
    "Animate": "it follows a given video",
    "Condition": "its condition frames belong to one segment",
}


def model_of(pipe: Any) -> Model:
    """The entry of a pipeline; raises :class:`UnsupportedModel` that says why there is none."""
    cls = next((c for c in type(pipe).__mro__ if c.__name__ in MODELS), None)
    name = type(pipe).__name__
    reason = next((why for word, why in REFUSED.items() if word in name), None)
    if cls is None or reason is not None:
        raise UnsupportedModel(
            f"{name}: {reason or 'no video pipeline whose tiles and texts this recipe knows'}",
            "recipe 'ditctrl'",
            f"it works on {', '.join(MODELS)}",
        )
    return MODELS[cls.__name__]
