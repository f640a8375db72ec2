"""Tiny trained models of the real classes, for demos and tests without a download.

``patchkit.zoo.load("video")`` returns a real ``CogVideoXPipeline`` that draws the shape world
(:mod:`patchkit.zoo.world`) in seconds on two CPU cores; :mod:`patchkit.zoo.detect` reads its clips back. Importing
this package imports neither diffusers nor transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from patchkit.errors import PatchkitError, nearest

__all__ = ["UnknownZooModel", "defaults", "describe", "load", "load_folder", "names", "path"]


class UnknownZooModel(PatchkitError, LookupError):
    """The zoo has no model of that name."""


@dataclass(frozen=True)
class _Entry:
    """One model: the folder beside this file, the pipeline class that reads it, and how it is best called."""

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
}


def names() -> tuple[str, ...]:
    """The models that :func:`load` knows."""
    return tuple(sorted(_ENTRIES))


def describe(name: str) -> str:
    """One line about a model."""
    return _entry(name).about


def defaults(name: str) -> dict[str, Any]:
    """The call arguments that a model is evaluated with, an example prompt included: ``pipe(**zoo.defaults(name))``."""
    return dict(_entry(name).call)


def path(name: str) -> Path:
    """The folder of a model, in diffusers' ``save_pretrained`` layout."""
    return Path(__file__).parent / _entry(name).folder


def load(name: str, torch_dtype: Any = None, device: Any = None) -> Any:
    """Load a trained tiny pipeline, offline.

    It can be called with a prompt alone. ``pipe(**zoo.defaults(name))`` adds the steps and the guidance with which it
    was evaluated; the pipeline's own default guidance is too strong for it.

    Args:
        name: one of :func:`names`; the prefix ``zoo/`` may stand before it.
        torch_dtype: dtype of the weights; fp32 by default (they are stored in fp16).
        device: where to put the pipeline; the CPU by default.
    """
    entry = _entry(name)
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
    cap_length(pipe.tokenizer)
    return pipe


def _entry(name: str) -> _Entry:
    key = name.removeprefix("zoo/")
    if key not in _ENTRIES:
        raise UnknownZooModel(f"the zoo has no model {name!r}", remedy=nearest(key, _ENTRIES))
    return _ENTRIES[key]
