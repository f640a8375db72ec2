"""The table rows: how to build one tiny model, how to call it, and what is known about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from transformers import PreTrainedModel

from . import facts

PROMPT = "a red circle"
NEGATIVE = "blur"


@dataclass(frozen=True)
class TinyPipeline:
    """One diffusers pipeline.

    ``call`` holds the arguments of a run that stops at the latents, guidance on. ``variants`` holds named changes to
    it (``"no_cfg"``, ``"true_cfg"``, ``"decode"``, ``"batch"``); sizes, frames and steps are plain arguments and are
    changed by passing them to :func:`run`.
    """

    name: str
    build: Callable[..., DiffusionPipeline]
    call: Mapping[str, Any]
    denoisers: tuple[str, ...] = ("transformer",)
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def expected(self) -> facts.Facts:
        """What is true of it by upstream's source: see ``facts.py``."""
        return facts.PIPELINES[self.name]

    @property
    def video(self) -> bool:
        return "num_frames" in self.call

    def arguments(self, variant: str | None = None, **extra: Any) -> dict[str, Any]:
        return {**self.call, **(self.variants[variant] if variant else {}), **extra}


@dataclass(frozen=True)
class TinyModel:
    """One transformers model. ``inputs`` makes a batch for it; ``causal`` says whether it generates text."""

    name: str
    build: Callable[..., PreTrainedModel]
    inputs: Callable[[PreTrainedModel], dict[str, torch.Tensor]]
    causal: bool = True

    @property
    def expected(self) -> facts.ModelFacts:
        return facts.MODELS[self.name]


def run(
    entry: TinyPipeline,
    pipe: DiffusionPipeline,
    *,
    seed: int = 0,
    steps: int = 2,
    variant: str | None = None,
    **extra: Any,
) -> torch.Tensor:
    """Run a pipeline from a seed and return its latents (or, with ``variant="decode"``, its pictures in [0, 1])."""
    pipe.set_progress_bar_config(disable=True)
    arguments = entry.arguments(variant, **extra)
    arguments.setdefault("generator", torch.Generator().manual_seed(seed))
    return pipe(**arguments, num_inference_steps=steps, return_dict=False)[0]


@torch.no_grad()
def forward(entry: TinyModel, model: PreTrainedModel, **extra: Any) -> torch.Tensor:
    """Logits of one forward pass; the last hidden state where the model has no head."""
    output = model(**{**entry.inputs(model), **extra})
    return output.logits if "logits" in output else output.last_hidden_state


@torch.no_grad()
def generate(entry: TinyModel, model: PreTrainedModel, *, new_tokens: int = 8, **extra: Any) -> torch.Tensor:
    """Greedy continuation of the entry's inputs, prompt included: exactly ``new_tokens`` tokens longer."""
    if not entry.causal:
        raise ValueError(f"{entry.name} does not generate text")
    lengths = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    return model.generate(**{**entry.inputs(model), "do_sample": False, **lengths, **extra})
