"""Tiny trained models of the real classes, for demos and tests without a download.

``patchkit.zoo.load("video")`` returns a real ``CogVideoXPipeline`` that draws the shape world
(:mod:`patchkit.zoo.world`) in seconds on two CPU cores; :mod:`patchkit.zoo.detect` reads its clips back.
``patchkit.zoo.load("gemma")`` and ``("minilm")`` return real language models that install as packages
(:mod:`patchkit.zoo.language`); ``patchkit.zoo.load("vlm")`` a ``LlavaForConditionalGeneration`` and its processor
(:class:`patchkit.zoo.chat.VisionLanguage`). Importing this package imports neither diffusers nor transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from patchkit.errors import PatchkitError, nearest

__all__ = ["UnknownZooModel", "defaults", "describe", "load", "load_folder", "names", "path", "prose", "shipped"]


class UnknownZooModel(PatchkitError, LookupError):
    """The zoo has no model of that name."""


@dataclass(frozen=True)
class _Entry:
    """One model: where it is, the class that reads it, and how it is best called.

    ``folder`` is beside this file; a model without one comes in a package that :mod:`patchkit.zoo.language` reads.
    An ``image`` in ``call`` is a file of the folder.
    """

    folder: str
    pipeline: str
    about: str
    call: dict[str, Any] = field(default_factory=dict)


_ENTRIES = {
    "video": _Entry(
        folder="video",
        pipeline="CogVideoXPipeline",
        about="text to video, 17 frames of 64x64: one coloured shape that moves on a coloured background",
        call={
            "prompt": "a red circle moving right on a blue background",
            "num_inference_steps": 20,
            "guidance_scale": 1.5,
        },
    ),
    "gemma": _Entry(
        folder="",
        pipeline="",
        about="Gemma 3 270M, a real language model of 18 layers, from a package of its own",
        call={"prompt": "The tide turned at three in the morning, and", "max_new_tokens": 40},
    ),
    "minilm": _Entry(
        folder="", pipeline="", about="all-MiniLM-L6-v2, a real sentence encoder of 6 layers, from a package of its own"
    ),
    "bytes": _Entry(
        folder="",
        pipeline="",
        about="an untrained Llama of 4 layers and 12 heads that reads bytes, to be trained from the beginning",
        call={"prompt": "The tide turned at three in the morning, and", "max_new_tokens": 40},
    ),
    "image": _Entry(
        folder="image",
        pipeline="StableDiffusionPipeline",
        about="text to image, 64x64: up to two coloured shapes and where they are; can be inverted and edited",
        call={
            "prompt": "a red circle left of a green square on a blue background",
            "num_inference_steps": 25,
            "guidance_scale": 2.0,
        },
    ),
    "dit": _Entry(
        folder="dit",
        pipeline="StableDiffusion3Pipeline",
        about="text to image, 64x64: up to two coloured shapes and where they are",
        call={
            "prompt": "a red circle left of a green square on a blue background",
            "num_inference_steps": 20,
            "guidance_scale": 1.5,
        },
    ),
    "flux": _Entry(
        folder="flux",
        pipeline="FluxPipeline",
        about="text to image, 64x64, as dit; double and single blocks",
        call={
            "prompt": "a red circle left of a green square on a blue background",
            "negative_prompt": "",
            "num_inference_steps": 20,
            "true_cfg_scale": 1.5,
        },
    ),
    "vlm": _Entry(
        folder="vlm",
        pipeline="LlavaForConditionalGeneration",
        about="questions about pictures of 64x64: colours, shapes, places and number of coloured shapes",
        call={"image": "example.png", "prompt": "what is in the picture?", "max_new_tokens": 24},
    ),
}
_CHATS = ("LlavaForConditionalGeneration",)  # a transformers model with a processor instead of a pipeline


def names() -> tuple[str, ...]:
    """The models that :func:`load` knows."""
    return tuple(sorted(_ENTRIES))


def shipped(name: str) -> bool:
    """Whether a model is part of this package; others install as packages of their own."""
    return bool(_entry(name).folder)


def prose() -> str:
    """2,500 words of English, written for this project, so that no language model has read them: for perplexities."""
    return (Path(__file__).parent / "texts" / "the-tide-mill.txt").read_text(encoding="utf-8")


def describe(name: str) -> str:
    """One line about a model."""
    return _entry(name).about


def defaults(name: str) -> dict[str, Any]:
    """The call arguments that a model is evaluated with, an example prompt included: ``pipe(**zoo.defaults(name))``.

    Those of ``vlm`` are the inputs of a recipe file; ``image`` is the path of a picture.
    """
    call = dict(_entry(name).call)
    return call | {"image": str(path(name) / call["image"])} if "image" in call else call


def path(name: str) -> Path:
    """The folder of a model in ``save_pretrained`` layout. Those of other packages need not be there yet."""
    entry = _entry(name)
    if not entry.folder:
        from patchkit.zoo import language

        return language.folder_of(_key(name))
    return Path(__file__).parent / entry.folder


def load(name: str, torch_dtype: Any = None, device: Any = None) -> Any:
    """Load a trained tiny pipeline, or a pair, offline.

    Language models come with their tokenizer (``.model``, ``.tokenizer``), ``vlm`` with its processor (``.processor``).

    A pipeline can be called with a prompt alone. ``pipe(**zoo.defaults(name))`` adds the steps and the guidance with
    which it was evaluated; the pipeline's own default guidance is too strong for it.

    Args:
        name: one of :func:`names`; the prefix ``zoo/`` may stand before it.
        torch_dtype: dtype of the weights; fp32 by default (they are stored in fp16).
        device: where to put the pipeline; the CPU by default.

    Raises:
        UnknownZooModel: there is no such model.
        MissingDependency: the model comes in a package that is not installed.
    """
    entry = _entry(name)
    if entry.pipeline in _CHATS:
        from patchkit.zoo.chat import load_chat

        pair: Any = load_chat(path(name), torch_dtype)
        return pair if device is None else pair._replace(model=pair.model.to(device))
    if not entry.folder:
        from patchkit.zoo import language

        pair = language.load(_key(name), torch_dtype)
        return pair if device is None else pair._replace(model=pair.model.to(device))
    pipe = load_folder(path(name), entry.pipeline, torch_dtype)
    return pipe if device is None else pipe.to(device)


def load_folder(folder: Path, pipeline: str, torch_dtype: Any = None) -> Any:
    """Load a pipeline of the zoo's making from any folder, ready to be called without further arguments."""
    import diffusers
    import torch
    from diffusers.utils import deprecation_utils

    from patchkit.zoo.text import cap_length

    # newer releases of diffusers call it "dtype" and warn about the older name
    argument = "dtype" if hasattr(deprecation_utils, "_resolve_dtype") else "torch_dtype"
    options = {argument: torch_dtype or torch.float32, "local_files_only": True}
    pipe = getattr(diffusers, pipeline).from_pretrained(folder, **options)
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        if getattr(pipe, name, None) is not None:
            cap_length(getattr(pipe, name))
    if hasattr(pipe, "default_sample_size"):  # FluxPipeline takes 128 whatever its parts are made for
        pipe.default_sample_size = pipe.vae.config.sample_size // pipe.vae_scale_factor
    return pipe


def _key(name: str) -> str:
    return name.removeprefix("zoo/")


def _entry(name: str) -> _Entry:
    key = _key(name)
    if key not in _ENTRIES:
        raise UnknownZooModel(f"the zoo has no model {name!r}", remedy=nearest(key, _ENTRIES))
    return _ENTRIES[key]
