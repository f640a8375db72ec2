"""What the tests of DiTCtrl on pipelines have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tiny
import torch
from torch import Tensor

import patchkit
from patchkit import Recipe, recipe
from patchkit.context import AttentionCall, DenoiseCall
from patchkit.recipes.ditctrl import DiTCtrl

PROMPTS = ["a red circle", "a bl circle", "a re square"]
SHORT: dict[str, Any] = {"overlap": 1, "kv_layers": "2-", "kv_steps": (1, 3)}  # for 4 blocks, 3 latent frames, 4 steps


@recipe("toy-pairwise")
@dataclass(frozen=True, kw_only=True)
class Pairwise(DiTCtrl):
    """Every pair by itself, as the official code does it."""

    deduplicates = False


@recipe("toy-inside")
@dataclass(frozen=True, kw_only=True)
class Inside(Recipe):
    """Sees what DiTCtrl hands on: (step, part, tensor) of forwards; (step, part, layer, call) of ops."""

    after = ("ditctrl", "toy-pairwise")
    kinds = ("self", "cross", "joint")

    def validate(self) -> None:
        object.__setattr__(self, "forwards", [])
        object.__setattr__(self, "ops", [])
        object.__setattr__(self, "inputs", [])

    def denoise(self, call: DenoiseCall, next: Callable[[DenoiseCall], Any]) -> Any:
        out = next(call)
        self.inputs.append((call.step, call.moment.part, call.branch, call.kwargs))
        self.forwards.append((call.step, call.moment.part, call.branch, out[0]))
        return out

    def attend(self, call: AttentionCall, next: Callable[[AttentionCall], Tensor]) -> Tensor:
        self.ops.append((call.step, call.moment.part, call.site.layer, call))
        return next(call)


@recipe("toy-noisy-keys")
@dataclass(frozen=True, kw_only=True)
class NoisyKeys(Recipe):
    """Puts noise in the place of the targets' own keys and values in some layers, before DiTCtrl sees them."""

    of: list[int]
    before = ("ditctrl",)

    def attend(self, call: AttentionCall, next: Callable[[AttentionCall], Tensor]) -> Tensor:
        if call.moment.part.endswith("target") and call.site.layer in self.of:
            call = call.replace(k=torch.randn_like(call.k), v=torch.randn_like(call.v))
        return next(call)


def build(name: str = "cogvideox2b", layers: int = 4) -> tuple[Any, Any]:
    entry = tiny.PIPELINES[name]
    pipe = entry.build(layers=layers)
    loud(pipe)
    return entry, pipe


def loud(pipe: Any) -> None:
    """Random weights are so small that keys hardly matter; larger ones make every mistake show."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in pipe.transformer.named_parameters():
        if any(part in name for part in ("to_q.", "to_k.", "to_v.", "to_out.")) and parameter.ndim == 2:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 2 / parameter.shape[1] ** 0.5


def run(entry: Any, pipe: Any, recipes: Any, steps: int = 4, **call: Any) -> Tensor:
    """The latents of a patched run without a negative prompt."""
    call.setdefault("prompt", PROMPTS[:2])
    call.setdefault("negative_prompt", None)
    with patchkit.apply(pipe, recipes):
        return tiny.run(entry, pipe, steps=steps, **call)


def encoded(pipe: Any, prompt: str) -> Tensor:
    with torch.no_grad():
        found: Tensor = pipe.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=16)[0]
    return found


def tokens(pipe: Any, prompt: str, word: str) -> list[int]:
    start = prompt.index(word)
    offsets = pipe.tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
    return [i for i, (a, b) in enumerate(offsets) if max(a, start) < min(b, start + len(word))]
