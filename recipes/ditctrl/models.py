"""What differs between the video pipelines that DiTCtrl works on, as data: one entry a pipeline class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from patchkit.errors import UnsupportedModel
from patchkit.recipes.ditctrl import words

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
        packed: whether latents are (B, tokens, C), frame by frame, and an argument tells how many frames they are.
        splits: whether the guidance halves of a batch are forwarded one by one, the conditional one first: the model
            calls attention sample by sample, and the unconditional sample would come before the masks that it needs.
        template: whether the prompt is put into the text of a template, of which the beginning is cut off again.
        guided: whether a call asks for classifier-free guidance.
        remark: what a reader of the report should know.
    """

    name: str
    axis: int
    texts: tuple[str, ...]
    frame_ratio: str
    maps: Literal["joint", "cross"]
    zeros: bool = False
    rotary: str | None = None
    packed: bool = False
    splits: bool = False
    template: bool = False
    guided: Callable[[Arguments], bool] = lambda given: (given.get("guidance_scale") or 0) > 1
    remark: str = ""

    def encode(self, pipe: Any, prompt: str, given: Arguments) -> dict[str, Tensor]:
        """What the denoiser is told of one prompt, each with a batch of one."""
        options = {"max_sequence_length": given["max_sequence_length"], "device": pipe._execution_device}
        own = {"prompt_template": given["prompt_template"]} if self.template else {"do_classifier_free_guidance": False}
        with torch.no_grad():
            found = pipe.encode_prompt(prompt=prompt, **own, **options)
        return dict(zip(self.texts, found, strict=False))

    def tokens(self, pipe: Any, prompt: str, word: str, where: str, given: Arguments) -> tuple[int, ...]:
        """Places of a word's tokens among those that the denoiser gets; see :func:`words.places`."""
        limit = given["max_sequence_length"]
        if not self.template:
            return words.places(pipe.tokenizer, prompt, word, where, limit)
        template = given["prompt_template"]
        around = tuple(template["template"].split("{}"))
        crop = template.get("crop_start")
        if crop is None:  # as the pipeline counts: without the end token and the place of the prompt
            crop = len(pipe.tokenizer(template["template"])["input_ids"]) - 2
        return words.places(pipe.tokenizer, prompt, word, where, limit, (around[0], around[-1]), crop)

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
    "WanPipeline": Model(
        name="wan",
        axis=2,
        texts=("encoder_hidden_states",),
        frame_ratio="vae_scale_factor_temporal",
        maps="cross",
    ),
    "HunyuanVideoPipeline": Model(
        name="hunyuanvideo",
        axis=2,
        texts=("encoder_hidden_states", "pooled_projections", "encoder_attention_mask"),
        frame_ratio="vae_scale_factor_temporal",
        maps="joint",
        template=True,
        guided=lambda given: (given.get("true_cfg_scale") or 0) > 1 and given.get("negative_prompt") is not None,
    ),
    "MochiPipeline": Model(
        name="mochi",
        axis=2,
        texts=("encoder_hidden_states", "encoder_attention_mask"),
        frame_ratio="vae_temporal_scale_factor",
        maps="joint",
        splits=True,
    ),
    "LTXPipeline": Model(
        name="ltx",
        axis=1,
        texts=("encoder_hidden_states", "encoder_attention_mask"),
        frame_ratio="vae_temporal_compression_ratio",
        maps="cross",
        packed=True,
        remark="this pipeline shifts its noise schedule by the length of the whole video, not of a segment",
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
    if getattr(pipe.config, "expand_timesteps", False):
        raise UnsupportedModel(
            f"{name}: this checkpoint has a noise level for each token of one segment",
            "recipe 'ditctrl'",
            "use a checkpoint without expand_timesteps",
        )
    return MODELS[cls.__name__]
