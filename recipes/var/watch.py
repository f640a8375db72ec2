"""Recipes that change nothing and look: what the probe for sink channels is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from patchkit.context import AttentionCall, BlockInput
from patchkit.kernels.classes.reference import logits_reference
from patchkit.recipe_base import Recipe
from patchkit.recipes.var import models
from patchkit.recipes.var.channels import Identity, identity_of
from patchkit.recipes.var.sinks import EPSILON, outlier
from patchkit.sites import Site

ROWS = 128
FAR_BELOW = 0.5  # of tau


@dataclass(frozen=True, kw_only=True)
class Watcher(Recipe):
    """Shows :meth:`look` the hidden states that enter a block together with what its tokens are."""

    name: ClassVar[str] = "var-probe"
    kinds: ClassVar[tuple[str, ...]] = ("self",)
    families: ClassVar[tuple[str, ...]] = ("transformers",)

    identity: ClassVar[Identity]
    numbers: ClassVar[list[int]]
    images: ClassVar[int]

    def accepts(self, site: Site) -> str | None:
        """The language model only."""
        return "the vision tower" if site.component == "vision" else None

    def prepare(self, target: Any, sites: list[Site]) -> None:
        """Learn what the model is."""
        models.check(target, sites, "patchkit.recipes.var.probe")
        object.__setattr__(self, "identity", identity_of(models.model_of(target), sites[0].module.config))
        object.__setattr__(self, "numbers", sorted({site.layer for site in sites}))

    def begin(self) -> None:
        """A prompt begins."""

    def end(self) -> None:
        """A prompt has been read."""

    def enter(self, call: BlockInput) -> None:
        """Keep the hidden states for the attention of the same block."""
        call.shared["hidden"] = call.hidden

    def attend(self, call: AttentionCall, next: Callable[[AttentionCall], Tensor]) -> Tensor:
        """Look, and pass on."""
        if call.visual is not None and call.real is not None:
            self.look(call, call.shared["hidden"].float(), call.visual, call.real)
        return next(call)

    def look(self, call: AttentionCall, hidden: Tensor, visual: Tensor, real: Tensor) -> None:
        """hidden (B, N, d), visual and real (B, N), of a whole prompt at one layer."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class FirstTokens(Watcher):
    """|x| / RMS(x) of each channel at the first token."""

    rows: ClassVar[list[Tensor]]  # (layers, d), one a prompt
    _running: ClassVar[list[Tensor]]

    def validate(self) -> None:
        """Nothing has been seen."""
        for name, value in (("rows", []), ("_running", []), ("images", 0)):
            object.__setattr__(self, name, value)

    def begin(self) -> None:
        """A prompt (or a batch of them) begins."""
        self._running.clear()

    def end(self) -> None:
        """File what was seen, prompt by prompt."""
        self.rows.extend(torch.stack(self._running, 1))

    def look(self, call: AttentionCall, hidden: Tensor, visual: Tensor, real: Tensor) -> None:
        """Of the first real token of each sample."""
        if not self._running:
            object.__setattr__(self, "images", self.images + int(visual.any(1).sum()))
        x = hidden[torch.arange(len(hidden), device=hidden.device), real.int().argmax(1)]
        self._running.append((x.abs() * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON)).cpu())


@dataclass(frozen=True, kw_only=True)
class Judging(Watcher):
    """Whether some channels tell sinks apart: counts over all tokens, prompts and layers."""

    dims: tuple[int, ...]
    tau: float

    tokens: ClassVar[dict[str, float]]
    ratios: ClassVar[list[float]]
    _with_sinks: ClassVar[Tensor | None]

    def validate(self) -> None:
        """Nothing has been seen."""
        names = ("all", "far_below", "between", "first", "fires", "images", "with_sinks", "visual", "places")
        object.__setattr__(self, "tokens", dict.fromkeys(names, 0.0))
        object.__setattr__(self, "ratios", [])
        self.begin()

    def begin(self) -> None:
        """A prompt (or a batch of them) begins."""
        object.__setattr__(self, "_with_sinks", None)

    def end(self) -> None:
        """Count the prompts that have a visual sink somewhere."""
        if self._with_sinks is not None:
            self.tokens["with_sinks"] += float(self._with_sinks.sum())

    def look(self, call: AttentionCall, hidden: Tensor, visual: Tensor, real: Tensor) -> None:
        """Count modes, first tokens and visual sinks of one layer."""
        phi = outlier(hidden, self.dims)
        sink, counts = (phi >= self.tau) & real, self.tokens
        counts["all"] += float(real.sum())
        counts["far_below"] += float((real & (phi < FAR_BELOW * self.tau)).sum())
        counts["between"] += float((real & (phi >= FAR_BELOW * self.tau) & (phi < self.tau)).sum())
        first = real.int().argmax(1, keepdim=True)
        counts["first"] += len(first)
        counts["fires"] += float(sink.gather(1, first).sum())
        pictured = visual.any(1)
        counts["places"] += float(pictured.sum())
        counts["visual"] += float((sink & visual).sum())
        some = (sink & visual).any(1)
        if self._with_sinks is None:
            counts["images"] += float(pictured.sum())
        object.__setattr__(self, "_with_sinks", some if self._with_sinks is None else self._with_sinks | some)
        if bool(some.any()):
            self._weigh(call, sink & visual, visual, ~visual & real, some)

    def _weigh(self, call: AttentionCall, sink: Tensor, visual: Tensor, text: Tensor, some: Tensor) -> None:
        """Attention of text queries to a visual sink, as a multiple of that to a visual token."""
        to_keys = torch.zeros(sink.shape, device=sink.device)
        nobody = torch.zeros(1, call.k.shape[2], dtype=torch.uint8, device=call.k.device)
        for rows in torch.arange(call.q.shape[2], device=call.q.device).split(ROWS):
            q = call.q[:, :, rows]
            s = logits_reference(q, call.k, nobody, call.visible(rows), call.scale, call.softcap)
            weights = torch.softmax(s, -1).nan_to_num(0.0).mean(1)  # (B, R, Nk), mean over heads
            to_keys += (weights * text[:, rows, None]).sum(1)
        for b in some.nonzero()[:, 0].tolist():
            one = float(to_keys[b][visual[b]].mean())
            if one > 0:
                self.ratios.append(float(to_keys[b][sink[b]].mean()) / one)
